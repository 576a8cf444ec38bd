"""Samplers against brute force and obvious re-computations."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest

from selectune.examples.factors.determinant import greedy_determinant, log_determinant, log_determinant_distance
from selectune.examples.factors.neighbours import neighbours
from selectune.examples.factors.normalise import minimum_maximum, percentile_ranks, standard, topsis
from selectune.examples.factors.strata import fair_shares, k_means, members, round_robin
from selectune.examples.factors.submodular import FacilityLocation, OfMatrix, OfVectors, coverage, herding, k_centre, lazy_greedy


def unit(count, dimension, seed=0):
    made = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def value(kernel, chosen, floor=None, cap=None):
    """Facility location by its definition."""
    found = kernel if cap is None else np.minimum(kernel, cap[:, None])
    start = np.zeros(len(kernel)) if floor is None else floor
    best = start if not len(chosen) else np.maximum(start, found[:, list(chosen)].max(1))
    return float((best - start).sum())


def plain_greedy(kernel, count, **options):
    chosen = []
    for _ in range(count):
        rest = [j for j in range(kernel.shape[1]) if j not in chosen]
        chosen.append(max(rest, key=lambda j: (round(value(kernel, [*chosen, j], **options), 9), -j)))
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_lazy_greedy_is_plain_greedy_and_near_the_optimum(seed):
    generator = np.random.default_rng(seed)
    kernel = generator.random((12, 12))
    options = {"plain": {}, "floor": {"floor": generator.random(12) * 0.5}, "cap": {"cap": generator.random(12)}}
    for given in options.values():
        chosen, gains = lazy_greedy(FacilityLocation(OfMatrix(kernel), **given), 4)
        assert chosen.tolist() == plain_greedy(kernel, 4, **given)
        assert gains.sum() == pytest.approx(value(kernel, chosen, **given), rel=1e-5)
        best = max(value(kernel, some, **given) for some in combinations(range(12), 4))
        assert gains.sum() >= (1 - 1 / math.e) * best - 1e-9
        assert all(a >= b - 1e-6 for a, b in pairwise(gains))


def test_vectors_and_their_kernel_give_the_same_choice():
    vectors = unit(700, 16)  # more than one block
    kernel = (1 + vectors @ vectors.T) / 2
    by_vectors, _ = lazy_greedy(FacilityLocation(OfVectors(vectors)), 20)
    by_matrix, _ = lazy_greedy(FacilityLocation(OfMatrix(kernel)), 20)
    assert by_vectors.tolist() == by_matrix.tolist()


@pytest.mark.parametrize("given", ["plain", "floor", "cap", "both"])
def test_lists_of_neighbours_leave_the_greedy_choice_as_it_is(given, monkeypatch):
    """Settled records are read from their lists, the others are computed: what comes out is plain greedy by the definition."""
    monkeypatch.setattr("selectune.examples.factors.neighbours.TILE", (32, 48))
    vectors, generator = unit(300, 6), np.random.default_rng(1)
    vectors[100:110] = vectors[0]  # repetitions tie with each other
    kernel = ((1 + vectors @ vectors.T) / 2).astype(np.float64)
    options = {"floor": {"floor": generator.random(300) * 0.8}, "cap": {"cap": generator.random(300)}, "plain": {},
               "both": {"floor": generator.random(300) * 0.5, "cap": generator.random(300)}}[given]  # fmt: skip
    function = FacilityLocation(OfVectors(vectors), listed=12, **options)
    chosen, gains = lazy_greedy(function, 60)
    assert len(function._open) < 60  # nearly all were settled on the way: the lists were used
    best = options.get("floor", np.zeros(300)).copy()
    found = kernel if "cap" not in options else np.minimum(kernel, options["cap"][:, None])
    for place, gain in zip(chosen.tolist(), gains.tolist(), strict=True):
        now = np.maximum(found - best[:, None], 0).sum(0)
        assert now[place] == pytest.approx(now.max(), abs=1e-4) == gain
        best = np.maximum(best, found[:, place])


def test_large_pools_are_covered_in_blocks():
    vectors = unit(50, 6)
    whole, gains = coverage(vectors, 12)
    wanted, known = lazy_greedy(FacilityLocation(OfVectors(vectors)), 12)
    assert whole.tolist() == wanted.tolist() and gains == pytest.approx(known)
    places, _ = coverage(vectors, 12, block=20, seed=3)
    parts = [np.sort(part) for part in np.array_split(np.random.default_rng(3).permutation(50), 3)]
    for part in parts:
        own = [place for place in places.tolist() if place in part]
        assert len(own) == 4
        alone, _ = lazy_greedy(FacilityLocation(OfVectors(vectors[part])), 4)
        assert own == part[alone].tolist()
    assert [sum(place in part for place in places[:3].tolist()) for part in parts] == [1, 1, 1]  # in turn
    assert sorted(coverage(vectors, 50, block=20)[0].tolist()) == list(range(50))


def test_neighbours_are_all_above_the_threshold():
    vectors = unit(500, 8)
    similarities = OfVectors(vectors[:200], vectors)
    best = np.full(500, 0.6, np.float32)
    lists, gains = neighbours(similarities, 20, best)
    kernel = (1 + vectors @ vectors[:200].T) / 2
    wanted = kernel > lists.thresholds[:, None]
    assert 10 < wanted.sum(1).mean() < 30
    for place in range(200):
        rows, values = lists.column(place)
        assert sorted(rows.tolist()) == np.flatnonzero(wanted[:, place]).tolist()
        assert values == pytest.approx(kernel[rows, place], abs=1e-6)
    owners, rows, values = lists.columns(np.array([7, 3]))
    assert rows.tolist() == [*lists.column(7)[0], *lists.column(3)[0]] and owners.sum() == len(lists.column(3)[0])
    assert gains == pytest.approx(np.maximum(kernel - 0.6, 0).sum(0), rel=1e-4)


def plain_k_centre(vectors, count, first):
    chosen, nearest = [first], ((vectors - vectors[first]) ** 2).sum(1)
    while len(chosen) < count:
        free = np.setdiff1d(np.arange(len(vectors)), chosen)
        chosen.append(int(free[nearest[free].argmax()]))
        nearest = np.minimum(nearest, ((vectors - vectors[chosen[-1]]) ** 2).sum(1))
    return chosen


@pytest.mark.parametrize("contenders", [1, 7, 64, 1000])
def test_looking_at_few_changes_nothing(contenders, monkeypatch):
    monkeypatch.setattr("selectune.examples.factors.falling.CONTENDERS", contenders)
    vectors = unit(200, 8) * np.random.default_rng(1).integers(1, 4, (200, 1)).astype(np.float32)
    vectors = np.concatenate([vectors, vectors[:40]])  # some are repeated: they tie
    wanted = np.array(plain_k_centre(vectors.astype(np.float64), 120, 5))
    assert (k_centre(vectors, 120, 5) % 200).tolist() == (wanted % 200).tolist()
    assert sorted(k_centre(vectors, 240, 0).tolist()) == list(range(240))
    quality = np.random.default_rng(0).random(240) + 0.5
    few, gains = greedy_determinant(vectors, 60, quality)
    monkeypatch.setattr("selectune.examples.factors.falling.CONTENDERS", 10**6)
    all_, wanted = greedy_determinant(vectors, 60, quality)
    assert few.tolist() == all_.tolist() and gains == pytest.approx(wanted)


def test_nothing_is_as_large_as_the_pairs():
    """20,000 records would make a matrix of 1.6 GB."""
    import tracemalloc

    vectors = unit(20_000, 4)
    tracemalloc.start()
    lazy_greedy(FacilityLocation(OfVectors(vectors), listed=16), 3)
    k_centre(vectors, 50, 0)
    greedy_determinant(vectors, 50)
    herding(vectors, 50)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_ties_follow_the_given_order():
    kernel = np.ones((3, 5))
    assert lazy_greedy(FacilityLocation(OfMatrix(kernel)), 3)[0].tolist() == [0, 1, 2]
    order = np.array([4, 2, 0, 1, 3])
    assert lazy_greedy(FacilityLocation(OfMatrix(kernel)), 3, order)[0].tolist() == [4, 2, 0]


def test_greedy_determinant_equals_slogdet_from_scratch():
    vectors, quality = unit(30, 8), np.random.default_rng(1).random(30) + 0.5
    places, gains = greedy_determinant(vectors, 12, quality, tau=1e-2)
    chosen = []
    for place, gain in zip(places.tolist(), gains.tolist(), strict=True):

        def value_of(some):
            kernel = (vectors[some] @ vectors[some].T + 1e-2 * np.eye(len(some))) * np.outer(quality[some], quality[some])
            return float(np.linalg.slogdet(kernel.astype(np.float64))[1])

        before = value_of(chosen) if chosen else 0.0
        gains_now = {j: value_of([*chosen, j]) - before for j in range(30) if j not in chosen}
        assert gain == pytest.approx(max(gains_now.values()), abs=1e-3)
        assert gains_now[place] == pytest.approx(max(gains_now.values()), abs=1e-3)
        chosen.append(place)
    assert log_determinant(vectors[chosen], 1e-2) == pytest.approx(
        float(gains.sum() - 2 * np.log(quality[chosen]).sum()), abs=1e-2
    )


def test_incremental_gains_are_exact_in_double_precision():
    """Orthonormal vectors span the same in any order, log det 0; others to a millionth (vectors are kept in fp32, so exact ones are taken)."""
    vectors = np.random.default_rng(3).integers(-3, 4, size=(20, 6)).astype(np.float32)
    places, gains = greedy_determinant(vectors, 9, tau=0.5)
    exact = vectors.astype(np.float64)
    for number, gain in enumerate(gains.tolist()):
        now, before = (log_determinant(exact[places[:end]], 0.5) if end else 0.0 for end in (number + 1, number))
        assert gain == pytest.approx(now - before, abs=1e-6)
    assert greedy_determinant(np.eye(5), 5, tau=1e-12)[1] == pytest.approx(np.zeros(5), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_greedy_determinant_is_near_the_optimum(seed):
    """Of ``log det(I + L)``, which grows with every record: at least 1 - 1/e of the best set."""
    vectors = np.random.default_rng(seed).normal(size=(8, 4))
    places, gains = greedy_determinant(vectors, 3, tau=1.0)
    best = max(log_determinant(vectors[list(some)], 1.0) for some in combinations(range(8), 3))
    assert (1 - 1 / math.e) * best <= gains.sum() <= best + 1e-6
    assert gains.sum() == pytest.approx(log_determinant(vectors[places], 1.0), abs=1e-4)


def test_the_distance_of_a_reference_to_itself_is_none_and_repetitions_are_less_diverse():
    vectors, source = unit(40, 8), np.random.default_rng(0)
    places, _ = greedy_determinant(vectors, 6)
    reference = vectors[places]
    assert log_determinant_distance(reference, reference, source) == 0
    whole = log_determinant_distance(vectors, reference, source)
    assert 0 < whole < log_determinant_distance(np.repeat(vectors[:3], 14, axis=0), reference, source)


def test_a_repetition_adds_next_to_nothing():
    vectors = unit(6, 8)
    places, gains = greedy_determinant(np.concatenate([vectors, vectors]), 8, tau=1e-3)
    assert len(set((places[:6] % 6).tolist())) == 6
    assert gains[5] > -5 and gains[6] == pytest.approx(math.log(2e-3), abs=0.1)


def test_k_centre_takes_the_farthest():
    points = np.array([[0.0], [1.0], [10.0], [4.0]])
    assert k_centre(points, 4, first=0).tolist() == [0, 2, 3, 1]
    assert k_centre(points, 1, first=0, chosen=np.array([[10.0]])).tolist() == [0]


def test_herding_follows_the_mean():
    points = unit(50, 4)
    chosen = herding(points, 10)
    assert len(set(chosen.tolist())) == 10
    random = [np.linalg.norm(points[np.random.default_rng(s).permutation(50)[:10]].mean(0) - points.mean(0)) for s in range(20)]
    assert np.linalg.norm(points[chosen].mean(0) - points.mean(0)) < min(random)


def test_fair_shares_go_from_the_smallest_up():
    assert fair_shares([5, 10, 100], 30) == [5, 10, 15]
    assert fair_shares([5, 5], 30) == [5, 5]
    assert fair_shares([3, 100, 100], 10) == [3, 3, 4]
    assert sum(fair_shares([7, 1, 9, 4], 13)) == 13


def test_groups_are_met_in_turn():
    groups = [np.array([3, 1]), np.array([0, 2, 4])]
    assert round_robin(groups, [1, 2]).tolist() == [3, 0, 2, 1, 4]
    assert [group.tolist() for group in members(np.array([1, 0, 1]), np.array([2, 1, 0]))] == [[1], [2, 0]]


def test_clusters_do_not_depend_on_the_order_of_the_points():
    points = np.concatenate([unit(20, 4, 1) * 0.1 + 3, unit(20, 4, 2) * 0.1 - 3])
    labels, _ = k_means(points, 2, seed=0)
    assert len(set(labels[:20].tolist())) == 1 and labels[0] != labels[30]
    turned = points[::-1]
    again, _ = k_means(turned, 2, seed=0, order=np.arange(40)[::-1])
    assert again[::-1].tolist() == labels.tolist()
    assert k_means(np.ones((5, 2)), 3, seed=0)[0].tolist() == [0] * 5  # fewer distinct points than clusters


def test_normalisers():
    values = np.array([1.0, 3.0, np.nan, 2.0])
    assert np.nan_to_num(minimum_maximum(values), nan=-1).tolist() == [0, 1, -1, 0.5]
    assert minimum_maximum(np.ones(3)).tolist() == [0, 0, 0]
    assert standard(np.array([1.0, 3.0])).tolist() == [-1, 1]
    assert percentile_ranks(values).tolist() == [1 / 3, 1, 0, 2 / 3]
    assert percentile_ranks(np.array([2.0, 5.0, 2.0])).tolist() == [0.25, 1, 0.25]  # equal values, equal ranks
    assert percentile_ranks(np.ones(1)).tolist() == [0]
    columns = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    close = topsis(columns, (True, True))
    assert close.tolist() == pytest.approx([1, 0.5, 0])
    assert topsis(columns * np.array([7.0, 0.1]), (True, True)) == pytest.approx(close)
