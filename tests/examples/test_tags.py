"""Choices by tags: rare tags first, and skills in styles."""

import numpy as np
import pytest

from selectune.data import Message, Record
from selectune.examples import Pool
from selectune.examples.method import ranked
from selectune.examples.tags import RareFirst, Strata, quotas_filled, tags
from tests.examples.words import words  # noqa: F401

pytestmark = pytest.mark.usefixtures("words")


def record(question, answer):
    return Record("chat", (Message("user", question), Message("assistant", answer)))


def pool(records, seed=0):
    return Pool(records, load_base=lambda: None, make_encoder=lambda tokenizer: None, seed=seed, quiet=True)


MANY = [record(f"Tell me of {n} and {n * n}", f"word {'word ' * (n % 5)}") for n in range(60)]
LAMPS = [record("Which lamp?", f"lamp {n}, " * 13) for n in range(7)]
PUMPS = [record("How many pumps?", f"- {n} of them") for n in range(6)]


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("budget", [20, 40])
def test_every_tag_with_enough_records_gets_its_share_even_of_equal_vectors(budget, seed):
    made = pool(MANY + LAMPS + PUMPS, seed)
    method = RareFirst(count=budget, scales=(3,))
    vectors = method.embed(made)
    assert len(np.unique(vectors[60:], axis=0)) == 2  # thirteen rare records, two vectors
    tagged = tags(made, vectors, method.scales, method.least)
    counts = {tag: sum(tag in own for own in tagged) for tag in set().union(*tagged)}
    each = budget // len(counts)
    assert each >= 2
    chosen = method.select(made).places.tolist()
    got = {tag: sum(tag in tagged[place] for place in chosen) for tag in counts}
    assert all(got[tag] >= min(each, count) for tag, count in counts.items())


def test_quotas_rise_until_the_budget_is_used():
    vectors = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    rare_first = [np.arange(size) for size in (4, 12, 12, 40)]  # who has the rarest tag has all others too
    for budget in range(1, 41):
        chosen = quotas_filled(vectors, rare_first, budget, 0)
        assert budget <= len(chosen) == len(set(chosen)) and (budget > 4 or set(chosen) <= set(range(4)))
    assert len(quotas_filled(vectors, rare_first[:2], 40, 0)) == 12  # all there is


def test_a_group_in_which_a_record_is_chosen_already_is_passed_over():
    near, far = [[1.0, 0.01 * n] for n in range(6)], [[0.01 * n, 0.5] for n in range(2)]
    chosen = quotas_filled(np.array(near + far, np.float32), [np.array([0]), np.arange(8)], 4, 0)
    assert chosen[0] == 0 and chosen[1] in (6, 7)


TOLD = [record(f"Why {'pump ' * (n % 5)}and {'valve ' * (n % 7)}?", "It is so.") for n in range(30)]


def test_one_skill_in_one_style_is_the_plain_top():
    made = pool(TOLD)
    for count in (1, 7, 20):
        choice = Strata(clusters=1, count=count).select(made)
        assert choice.places.tolist() == ranked(made, choice.signals["closeness"])[:count].tolist()


def test_what_a_small_style_cannot_use_goes_to_the_others():
    listed = [record("Why the pump?", f"- {'so ' * (n + 1)}") for n in range(2)]
    counted = [record("Why the valve?", f"It is {n}") for n in range(4)]
    records = TOLD + listed + counted
    choice = Strata(clusters=1, count=15).select(pool(records))
    assert sorted(choice.places.tolist())[-6:] == [30, 31, 32, 33, 34, 35]  # all of both small styles, fewer than a third each
    plain = [place for place in ranked(pool(records), choice.signals["closeness"]).tolist() if place < 30]
    assert [place for place in choice.places.tolist() if place < 30] == plain[:9]


def test_a_record_with_two_styles_serves_either_and_is_taken_once():
    answers = ["- 3 of them", "- 4 of them", "- so", "- so so", "It is 5", "It is 6", *(f"So {'so ' * n}it is" for n in range(8))]
    chosen = Strata(clusters=1, count=8).select(pool([record("Why the pump?", answer) for answer in answers])).places.tolist()
    listed, counted, plain = (set(chosen) & set(places) for places in (range(4), (0, 1, 4, 5), range(6, 14)))
    assert len(set(chosen)) == 8 and len(listed) >= 2 and len(counted) >= 2
    assert len(plain) >= 3  # of three styles, not of four combinations


def test_a_budget_of_tokens_is_laid_over_skills_in_turn():
    questions = ("Why the pump?", "Which valve, which fuse?", "What of it all then?")
    records = [record(asks, "```x```" if n == 0 else f"So {'so ' * n}it is") for asks in questions for n in range(20)]
    made = pool(records)
    made.tokens = np.array([200 if n % 20 == 0 else 10 for n in range(60)])
    chosen = Strata(clusters=3, by="tokens", count=660).select(made).places
    spent = [int(made.tokens[chosen[chosen // 20 == skill]].sum()) for skill in range(3)]
    assert sum(spent) == 660 and max(spent) - min(spent) <= 10
