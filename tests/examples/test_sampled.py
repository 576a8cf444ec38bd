"""Every sampler by name: budgets, order, and what each of them promises, by brute force."""

from itertools import combinations

import numpy as np
import pytest

from selectune.data import Encoder, Message, Record
from selectune.data.duplicates import near_repeats
from selectune.errors import UserError
from selectune.examples import Pool
from selectune.examples.factors.criteria import batch_by_batch, knapsack_order, pareto_fronts
from selectune.examples.factors.determinant import draw
from selectune.examples.sampled import BY_SIGNALS, Sampled, repeats
from selectune.models import load_base
from tests.contracts.test_examples import RECORDS, TARGET, no_download, pool  # noqa: F401

SAMPLERS = Sampled.model_fields["sampler"].annotation.__args__


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_fills_the_budget_whatever_the_order(sampler, llama_folder):
    given = {"sampler": sampler, "clusters": 3, "batch": 4}
    first = Sampled(**given, count=60, by="tokens").select(pool(llama_folder))
    again = Sampled(**given, count=60, by="tokens").select(pool(llama_folder, RECORDS[::-1]))
    assert {RECORDS[p].key for p in first.places} == {RECORDS[::-1][p].key for p in again.places}
    assert 0 < pool(llama_folder).tokens[first.places].sum() <= 60
    if sampler == "knapsack":
        with pytest.raises(UserError, match="filled by tokens"):
            Sampled(**given, count=5).select(pool(llama_folder))
    else:
        places = Sampled(**given, count=5).select(pool(llama_folder)).places.tolist()
        assert len(set(places)) == 5


def test_top_bottom_and_threshold(llama_folder):
    made = pool(llama_folder)
    tokens = made.tokens
    top = Sampled(signals=("length",), count=4).select(made).places
    assert sorted(tokens[top]) == sorted(np.sort(tokens)[-4:])
    bottom = Sampled(signals=("length",), sampler="bottom", count=4).select(made).places
    assert sorted(tokens[bottom]) == sorted(np.sort(tokens)[:4])
    unread = Record("chat", (Message("user", "lamp " * 300), Message("assistant", "on")))
    silent = pool(llama_folder, [unread, *RECORDS])
    assert 0 not in Sampled(signals=("loss",), sampler="bottom", count=4).select(silent).places
    assert "1 records have no finite signal" in silent.notes[0]
    limit = float(np.sort(tokens)[-3])
    above = Sampled(signals=("length",), sampler="threshold", threshold=limit, count=10).select(made)
    assert (tokens[above.places] >= limit).all() and len(above.places) == (tokens >= limit).sum()
    assert any("pass the threshold" in note for note in made.notes)
    below = Sampled(signals=("length",), lower=("length",), sampler="threshold", threshold=limit, count=10).select(made)
    assert (tokens[below.places] <= limit).all()
    for wrong, told in (({"threshold": 1e9}, "no record passes"), ({"signals": ("length", "loss")}, "one signal")):
        with pytest.raises(UserError, match=told):
            Sampled(**{"signals": ("length",), "sampler": "threshold", "count": 3} | wrong).select(made)
    with pytest.raises(UserError, match="no target records"):
        Sampled(sampler="conditional_gain", count=3).select(pool(llama_folder, target=[]))


def test_strata_are_served_alike(llama_folder):
    made = pool(llama_folder)
    chosen = Sampled(signals=("length",), sampler="stratified", clusters=3, count=6).select(made).places
    ranks = np.empty(len(made), dtype=int)
    ranks[np.argsort(made.tokens, kind="stable")] = np.arange(len(made))
    assert np.bincount(ranks[chosen] * 3 // len(made), minlength=3).min() >= 1


@pytest.mark.parametrize("criteria", [1, 2, 3])
def test_fronts_are_peeled_off_one_by_one(criteria):
    columns = np.random.default_rng(criteria).integers(0, 6, (60, criteria)).astype(float)
    left, fronts, number = set(range(60)), np.empty(60), 0
    while left:
        free = {i for i in left if not any((columns[j] >= columns[i]).all() and (columns[j] > columns[i]).any() for j in left)}
        for place in free:
            fronts[place] = number
        left, number = left - free, number + 1
    assert pareto_fronts(columns).tolist() == fronts.tolist()


def filled(values, tokens, left):
    total = 0.0
    for place in knapsack_order(values, tokens, left).tolist():
        if tokens[place] <= left:
            left, total = left - tokens[place], total + values[place]
    return total


def test_a_knapsack_is_the_best_or_half_of_it(monkeypatch):
    generator = np.random.default_rng(0)
    for _ in range(20):
        values, tokens, budget = generator.random(9) + 0.01, generator.integers(1, 12, 9), 20
        best = max(
            sum(values[list(some)])
            for size in range(10)
            for some in combinations(range(9), size)
            if sum(tokens[list(some)]) <= budget
        )
        assert filled(values, tokens, budget) == pytest.approx(best)
        with monkeypatch.context() as patch:
            patch.setattr("selectune.examples.factors.criteria.EXACT", 0)
            assert filled(values, tokens, budget) >= best / 2
    with monkeypatch.context() as patch:
        patch.setattr("selectune.examples.factors.criteria.EXACT", 0)
        assert knapsack_order(np.array([2.0, 10.0]), np.array([1, 20]), 20).tolist() == [
            1,
            0,
        ]  # the dense one would keep the other out


def test_of_every_batch_the_best_share_is_kept():
    scores = np.random.default_rng(0).random(100)
    order = np.random.default_rng(1).permutation(100)
    kept = batch_by_batch(order, scores, 0.25, 20)
    assert len(kept) == 25
    for start in range(0, 100, 20):
        some = order[start : start + 20]
        assert kept[start // 4 : start // 4 + 5].tolist() == some[np.argsort(-scores[some])[:5]].tolist()
    assert len(batch_by_batch(order, scores, 0.07, 3)) == 7


def test_a_draw_follows_the_volumes():
    """Of all pairs of five vectors, each comes as often as its squared volume says."""
    vectors = np.random.default_rng(3).normal(size=(5, 3)).astype(np.float32)
    pairs = list(combinations(range(5), 2))
    volumes = np.array([np.linalg.det(vectors[list(pair)] @ vectors[list(pair)].T) for pair in pairs])
    generator, counts = np.random.default_rng(0), dict.fromkeys(pairs, 0)
    for _ in range(4000):
        counts[tuple(sorted(draw(vectors, 2, generator).tolist()))] += 1
    assert np.abs(np.array(list(counts.values())) / 4000 - volumes / volumes.sum()).max() < 0.03
    assert sorted(draw(vectors, 5, generator).tolist()) == list(range(5))  # more than the dimensions: several draws
    assert len(set(draw(np.ones((6, 3)), 4, generator).tolist())) == 4


def turns(question, answer="Yes."):
    return Record("chat", (Message("user", question), Message("assistant", answer)))


def test_near_repeats_are_found_and_no_more():
    words = [f"word{i}" for i in range(60)]
    text = " ".join(words)
    near, far = text.replace("word59", "other"), " ".join(words[:30] + [f"new{i}" for i in range(30)])
    records = [turns(text), turns(far), turns(near), turns(text), turns("Short."), turns("Short.")]
    assert near_repeats(records).tolist() == [-1, -1, 0, 0, -1, 4]
    assert near_repeats(records, must_equal=lambda record: record.question).tolist() == [-1, -1, -1, 0, -1, 4]


def test_nearly_all_that_are_alike_are_found():
    """At a similarity between 0.8 and 0.95, nine of ten at the least."""
    generator = np.random.default_rng(0)
    records, expected = [], 0
    for number in range(200):
        words = [f"{number}x{word}" for word in generator.integers(0, 10**6, 60)]
        changed = list(words)
        changed[int(generator.integers(60))] = "changed"
        records += [turns(" ".join(words)), turns(" ".join(changed))]
        expected += 1
    found = near_repeats(records)
    assert (found[::2] < 0).all() and (found[1::2] >= 0).sum() >= 0.9 * expected
    assert all(of in (-1, place - 1) for place, of in enumerate(found.tolist()) if place % 2)


def test_candidates_that_are_less_alike_are_left():
    """At a similarity of 0.58 a third of the pairs meet in a table, and none is a repetition."""
    records = []
    for number in range(50):
        words = [f"{number}x{word}" for word in range(60)]
        records += [
            turns(" ".join(words)),
            turns(" ".join("other" if place in (10, 30, 50) else w for place, w in enumerate(words))),
        ]
    assert (near_repeats(records) < 0).all()
    assert (near_repeats(records, threshold=0.5) >= 0).sum() > 5


def test_repeats_do_not_depend_on_the_order(llama_folder):
    text = " ".join(f"word{i}" for i in range(60))
    records = [turns(text), turns("Something else."), turns(text + " more"), turns(text)]
    for some in (records, records[::-1]):
        made = Pool(some, lambda: load_base(llama_folder), lambda words: Encoder(words, 128), quiet=True)
        assert [repeats(made)[some.index(record)] for record in records[:3]] == [2, 0, 2]
    kept = Sampled(signals=("repeats",), count=1).select(made).places
    assert some[int(kept[0])].question == "Something else."


def test_every_sampler_is_tried():
    assert set(BY_SIGNALS) < set(SAMPLERS) and len(SAMPLERS) == 16 and TARGET
