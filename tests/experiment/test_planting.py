"""A pool holds what was planted and nothing else; what a choice keeps of it follows from the hashes of its records."""

import numpy as np
import pytest

from selectune.data import Message, Record
from selectune.errors import UserError
from selectune.examples import Pool
from selectune.examples.random import RandomExamples
from selectune.examples.self_scoring import HighestLoss
from selectune.experiment import pools, recovery
from selectune.experiment.planting import EXACT, GENERAL, IN_DOMAIN, NEAR, OFF_DOMAIN, WRONG, plant
from selectune.experiment.pools import PlantedPool
from tests.test_mistakes import lines, put


def records(name, count, words=30):
    answer = " ".join(f"{name}{word}" for word in range(words))
    return [Record("chat", (Message("user", f"{name} question {i}"), Message("assistant", f"{i} {answer}")), source=name)
            for i in range(count)]  # fmt: skip


PARTS = {GENERAL: records("a", 60) + records("b", 40), IN_DOMAIN: records("t", 20), OFF_DOMAIN: records("o", 10)}


@pytest.fixture(scope="module")
def planted():
    return plant(PARTS, wrong=0.2, exact=0.1, near=0.05, seed=3)


def test_everything_is_there_in_its_share(planted):
    pool, account = planted
    assert account.sizes() == {GENERAL: 80, WRONG: 24, IN_DOMAIN: 16, OFF_DOMAIN: 10, EXACT: 12, NEAR: 6}
    assert len(pool) == 130 + 12 + 6
    again, same = plant(PARTS, wrong=0.2, exact=0.1, near=0.05, seed=3)
    assert again == pool and same == account
    assert plant(PARTS, wrong=0.2, exact=0.1, near=0.05, seed=4)[0] != pool


def test_wrong_answers_are_those_of_others_of_the_same_source(planted):
    pool, account = planted
    right = {record.prompt: record for part in PARTS.values() for record in part}
    answers = {(record.source, record.response) for part in PARTS.values() for record in part}
    wrong = [record for record in pool if account.kinds.get(record.key) == WRONG]
    for record in wrong:
        assert record.response != right[record.prompt].response and (record.source, record.response) in answers
    assert {record.source for record in wrong} == {"a", "b", "t"}
    for record in pool:
        if account.kinds.get(record.key) in (GENERAL, IN_DOMAIN):
            assert record.response == right[record.prompt].response


def test_a_wrong_choice_is_another_choice():
    asked = [Record("choice", (Message("user", f"q{i}"), Message("assistant", "ab"[i % 2])), choices=("a", "b"), answer=i % 2)
             for i in range(20)]  # fmt: skip
    pool, account = plant({IN_DOMAIN: asked}, wrong=0.5, exact=0, near=0, seed=0)
    assert account.sizes()[WRONG] == 10
    for record in pool:
        number = int(record.question[1:])
        assert record.response == record.choices[record.answer]
        assert (record.answer == number % 2) == (account.kinds[record.key] == IN_DOMAIN)


def test_copies_are_of_right_records_and_near_ones_differ(planted):
    pool, account = planted
    by_key = {record.key: record for record in pool}
    keys = [record.key for record in pool]
    assert all(keys.count(key) == 2 and account.kinds[key] in (GENERAL, IN_DOMAIN) for key in account.copies)
    for near, twin in account.twins.items():
        mine, original = by_key[near], by_key[twin]
        assert mine.question.endswith(original.question) and mine.question != original.question
        gone = len(original.response.split()) - len(mine.response.split())
        assert gone == 1 and set(mine.response.split()) < set(original.response.split())
    assert not account.copies.keys() & set(account.twins.values())


def test_a_copy_counts_only_beside_what_it_says_again(planted):
    pool, account = planted
    once = list(dict.fromkeys(record.key for record in pool if record.key not in account.twins))
    kept = account.kept(once)
    assert kept[EXACT] == kept[NEAR] == 0 and kept[WRONG] == kept[GENERAL] == 1
    everything = account.kept(record.key for record in pool)
    assert set(everything.values()) == {1.0}
    near, twin = next(iter(account.twins.items()))
    assert account.kept([near])[NEAR] == 0 and account.kept([near, twin])[NEAR] == pytest.approx(1 / 6)
    copied = next(iter(account.copies))
    assert account.kept([copied, copied])[EXACT] == pytest.approx(1 / 12)


def test_more_copies_than_right_records_are_refused():
    with pytest.raises(ValueError, match="copies are asked for"):
        plant({GENERAL: records("a", 10)}, wrong=0.5, exact=0.4, near=0.3, seed=0)


def test_the_area_is_that_of_a_hand_made_curve():
    assert recovery.area([], []) == 0.5
    assert recovery.area([0.0], [1.0]) == 1.0 and recovery.area([1.0], [0.0]) == 0.0
    assert recovery.area([0.5, 0.2], [0.5, 0.1]) == pytest.approx(0.2 * 0.05 + 0.3 * 0.3 + 0.5 * 0.75)


def test_what_a_choice_keeps_is_measured_at_every_budget(planted, llama_folder):
    from selectune.data import Encoder
    from selectune.models import load_base

    mixed, account = planted
    base = load_base(llama_folder)
    pool = Pool(mixed, lambda: base, lambda words: Encoder(words, 256), quiet=True)
    budgets = (0.2, 0.6)
    chosen = recovery.choices(RandomExamples(), pool, budgets)
    for budget, places in chosen.items():
        assert pool.tokens[places].sum() == pytest.approx(budget * pool.tokens.sum(), abs=float(pool.tokens.max()))
    found = recovery.recovery(chosen, pool, account)
    assert found.keys() == {WRONG, IN_DOMAIN, OFF_DOMAIN, EXACT, NEAR}
    perfect = np.array([place for place, key in enumerate(pool.keys) if account.kinds.get(key) in (GENERAL, IN_DOMAIN)])
    found = recovery.recovery({0.5: np.unique(perfect)}, pool, account)
    assert found[WRONG]["area"] == found[OFF_DOMAIN]["area"] == 0 and found[IN_DOMAIN]["kept"] == [1.0]
    ranked = recovery.choices(HighestLoss(), pool, budgets)
    at_once = HighestLoss(fraction=0.2, by="tokens").select(pool)
    assert ranked[0.2].tolist() == at_once.places.tolist()  # scored once, chosen as ever


def test_a_pool_is_read_from_several_files(tmp_path):
    for name in ("a", "o"):
        rows = [{"question": record.question, "answer": record.response} for record in records(name, 30)]
        put(tmp_path, f"{name}.jsonl", lines(rows))
    sources = {"sources": [{"train": str(tmp_path / "a.jsonl"), "records": 20}],
               "off_domain": [{"train": str(tmp_path / "o.jsonl"), "records": 5}], "in_domain": 8}  # fmt: skip
    own = records("t", 12)
    pool, account = pools.build(PlantedPool(**sources), own, {"target": ["a question 7"]})
    assert account.sizes() == {GENERAL: 20, IN_DOMAIN: 8, OFF_DOMAIN: 5, EXACT: 0, NEAR: 0} and len(pool) == 33
    assert "a question 7" not in {record.question for record in pool}  # the test asks it
    other, _ = pools.build(PlantedPool(**sources, seed=1), own, {"target": ["a question 7"]})
    assert {record.key for record in other} != {record.key for record in pool}
    with pytest.raises(UserError, match="14 records are asked for and 12 can be used"):
        pools.build(PlantedPool(**{**sources, "in_domain": 14}), own, {})
    short = max(len(record.question) + len(record.response) for record in records("a", 10))
    few, _ = pools.build(PlantedPool(**{**sources, "longest": short, "off_domain": [], "in_domain": 0,
                                        "sources": [{"train": str(tmp_path / "a.jsonl"), "records": 10}]}), own, {})  # fmt: skip
    assert max(len(record.question) + len(record.response) for record in few) <= short
