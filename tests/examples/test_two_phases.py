"""Infinity-Instruct's selection: the faithful-if lines of its card."""

import math
import re
import zlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from selectune.data import Message, Record
from selectune.examples import two_phases
from selectune.examples.factors.signals import ResponseLoss
from selectune.examples.factors.store import measure
from selectune.examples.tags import tags
from selectune.examples.two_phases import TwoPhases, hardest, log_importance, long_tail, without_duplicates
from tests.examples.test_signals import pool
from tests.examples.words import words  # noqa: F401

pytestmark = pytest.mark.usefixtures("words")


def record(question, answer):
    return Record("chat", (Message("user", question), Message("assistant", answer)))


LIKE = [record(f"What is fault {i}?", f"Lamp {i * 7} is on and the pump stops.") for i in range(8)]
UNLIKE = [record(f"Who wrote poem {i}?", f"Poet number {i + 3} did, in a far country.") for i in range(14)]
TARGET = [record(f"Which fault is it when lamp {i} is on?", "The pump stops.") for i in range(5)]


def grams(text):
    found = re.findall(r"\w+|[^\w\s]", text.lower())
    return found + [f"{a} {b}" for a, b in pairwise(found)]


def test_importance_is_the_ratio_of_both_bags_of_grams():
    texts, target, buckets = ["a lamp is on", "a poet", "lamp lamp lamp"], ["the lamp is on", "lamp"], 50

    def model(some):
        counts = Counter(zlib.crc32(gram.encode()) % buckets for text in some for gram in grams(text))
        return lambda gram: counts[zlib.crc32(gram.encode()) % buckets] / sum(counts.values())

    wanted, pooled = model(target), model(texts)
    expected = [sum(math.log((wanted(gram) + pooled(gram)) / 2 / pooled(gram)) for gram in grams(text)) for text in texts]
    texts, target = ([Record("text", text=text) for text in some] for some in (texts, target))
    assert log_importance(texts, target, buckets) == pytest.approx(expected)
    assert log_importance(texts, texts, buckets) == pytest.approx([0, 0, 0])


def test_a_small_target_is_not_like_the_shortest_records():
    long = [record(f"Which fault is it when lamp {i} is on?", "The pump stops, and so does the valve.") for i in range(6)]
    short = [record(f"Hi {word}!", "Yes.") for word in ("Ada", "Bo", "Cy", "Di", "Ed", "Flo")]
    logs = log_importance([*long, *short], TARGET, 10_000)
    assert min(logs[:6]) > max(logs[6:])


def test_a_long_tail_tag_is_no_more_frequent_than_the_percentile():
    tagged = [{"a"}] * 6 + [{"a", "b"}] * 4 + [{"c"}] * 2 + [{"d"}] + [set()]
    assert long_tail(tagged, 0.25).tolist() == ["d" in own for own in tagged]
    assert long_tail(tagged, 0.4).tolist() == [bool(own & {"c", "d"}) for own in tagged]
    assert long_tail(tagged, 1.0).tolist() == [bool(own) for own in tagged]
    assert not long_tail([set(), set()], 0.5).any()


def test_duplicates_go_before_anything_is_chosen(llama_folder):
    made = pool(llama_folder, [LIKE[0], LIKE[1], LIKE[0], record("what is fault 0?", LIKE[0].response)])
    kept = without_duplicates(made)
    assert kept.sum() == 2 and kept[1] and sum(kept[[0, 2, 3]]) == 1
    made = pool(llama_folder, [*LIKE, *LIKE])
    made.target = TARGET
    chosen = TwoPhases(count=8, steps=1).select(made).places
    assert len({made.keys[place] for place in chosen}) == 8


def test_the_foundation_is_like_the_target_and_the_weights_add_up_to_one(llama_folder):
    made = pool(llama_folder, [*UNLIKE, *LIKE])
    made.target = TARGET
    choice = TwoPhases(count=8, foundation=0.75, steps=1).select(made)
    assert choice.signals["importance"].sum() == pytest.approx(1)
    phase = choice.signals["phase"]
    assert np.flatnonzero(phase == 1).tolist() == sorted(choice.places[:6].tolist())
    assert all(place >= len(UNLIKE) for place in choice.places[:6])
    assert all(phase[place] == 2 for place in choice.places[6:])
    other = TwoPhases(count=4, foundation=1.0, steps=1).select(made).places
    made.seed = 1
    assert len(other) == 4 and all(place >= len(UNLIKE) for place in other)


def test_the_second_phase_is_rare_or_hard_after_the_first(llama_folder):
    odd = record("Translate this poem!", "```python\nprint('zq')\n```")
    made = pool(llama_folder, [*UNLIKE, odd, *LIKE])
    made.target = TARGET
    method = TwoPhases(count=6, foundation=0.5, steps=3, rare=0.1, scales=(2,))
    choice = method.select(made)
    losses, second = choice.signals["loss after the first phase"], choice.signals["phase"] == 2
    assert second[len(UNLIKE)]  # rare: nothing else is code
    rest = np.flatnonzero(choice.signals["phase"] != 1)
    assert second[rest[losses[rest].argmax()]]
    by_loss, last = np.argsort(losses).tolist(), len(losses) - 1
    hard = {place for rank, place in enumerate(by_loss) if rank >= 0.9 * last}
    rare = set(np.flatnonzero(long_tail(tags(made, method.embed(made), (2,), 1), 0.1)).tolist())
    assert set(np.flatnonzero(second).tolist()) == (hard | rare) & set(rest.tolist()) != set(rest.tolist())
    assert choice.places[3:].tolist() == sorted(np.flatnonzero(second).tolist(), key=lambda place: -losses[place])[:3]
    assert not np.allclose(losses, measure(made, ResponseLoss()))  # the base has learnt something


@pytest.fixture
def untrained(monkeypatch):
    """No model learns; every record is as hard as another."""
    monkeypatch.setattr(two_phases.Learnt, "losses", lambda self: np.zeros(len(self.pool)))


@pytest.mark.usefixtures("untrained")
def test_the_foundation_is_drawn_in_proportion_to_importance(llama_folder, monkeypatch):
    made = pool(llama_folder, [LIKE[0], LIKE[5], UNLIKE[0], record("Sing!", "La la la.")], target=TARGET)
    monkeypatch.setattr(two_phases, "log_importance", lambda *_: np.log([1.0, 2, 3, 4]))
    monkeypatch.setattr(two_phases, "without_duplicates", lambda pool: np.ones(4, dtype=bool))
    monkeypatch.setattr(two_phases, "tags", lambda *_, **__: [{"a"}] * 4)
    monkeypatch.setattr(TwoPhases, "embed", lambda self, pool: None)
    drawn = []
    for seed in range(1000):
        made.seed = seed
        drawn.append(int(TwoPhases(count=1, foundation=1.0).choose(made).places[0]))
    assert np.bincount(drawn) / 1000 == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.04)


@pytest.mark.usefixtures("untrained")
def test_copies_make_a_rare_tag_no_more_frequent(llama_folder, monkeypatch):
    odd = record("Translate this poem!", "```python\nprint('zq')\n```")
    seen = []
    plain = two_phases.long_tail
    monkeypatch.setattr(two_phases, "hardest", lambda losses, share: np.zeros(len(losses), dtype=bool))
    monkeypatch.setattr(two_phases, "long_tail", lambda tagged, share: seen.append(len(tagged)) or plain(tagged, share))
    made = pool(llama_folder, [*[odd] * 20, *UNLIKE, *LIKE], target=TARGET)
    choice = TwoPhases(count=6, foundation=0.5, rare=0.1, scales=(2,)).select(made)
    assert seen == [int(without_duplicates(made).sum())] and seen[0] <= 23
    assert (choice.signals["phase"][:20] == 2).sum() == 1  # one of its copies
    assert choice.signals["importance"].sum() == pytest.approx(1) and (choice.signals["importance"][:20] > 0).sum() == 1


def test_where_most_are_equally_hard_they_are_all_hard():
    assert hardest(np.array([1.0, 3, 3, 3, np.nan]), 0.25).tolist() == [False, True, True, True, False]
    assert hardest(np.arange(5.0), 0.25).tolist() == [False, False, False, True, True]
    assert not hardest(np.full(2, np.nan), 0.25).any()
