"""Choices by tags: rare tags first, and skills in styles."""

import numpy as np
import pytest

from selectune.data import Message, Record
from selectune.examples import Pool
from selectune.examples.tags import RareFirst, quotas_filled, tags
from tests.examples.words import words  # noqa: F401


def record(question, answer):
    return Record("chat", (Message("user", question), Message("assistant", answer)))


def pool(records, seed=0):
    return Pool(records, load_base=lambda: None, make_encoder=lambda tokenizer: None, seed=seed, quiet=True)


MANY = [record(f"Tell me of {n} and {n * n}", f"word {'word ' * (n % 5)}") for n in range(60)]
LAMPS = [record("Which lamp?", f"lamp {n}, " * 13) for n in range(7)]
PUMPS = [record("How many pumps?", f"- {n} of them") for n in range(6)]


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("budget", [20, 40])
def test_every_tag_with_enough_records_gets_its_share_even_of_equal_vectors(words, budget, seed):  # noqa: F811
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
