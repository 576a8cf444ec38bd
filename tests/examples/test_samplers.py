"""Samplers against brute force and obvious re-computations."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest

from selectune.examples.factors.determinant import greedy_determinant, log_determinant
from selectune.examples.factors.normalise import minimum_maximum, percentile_ranks, standard, topsis
from selectune.examples.factors.strata import fair_shares, k_means, members, round_robin
from selectune.examples.factors.submodular import FacilityLocation, OfMatrix, OfVectors, herding, k_centre, lazy_greedy


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
    assert percentile_ranks(values, np.arange(4)).tolist() == [1 / 3, 1, 0, 2 / 3]
    columns = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    close = topsis(columns, (True, True))
    assert close.tolist() == pytest.approx([1, 0.5, 0])
    assert topsis(columns * np.array([7.0, 0.1]), (True, True)) == pytest.approx(close)
