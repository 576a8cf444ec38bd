"""Coverage and diversity as submodular functions, maximised greedily.

Knows: facility location and its conditional-gain and mutual-information forms, the lazy greedy algorithm (Minoux 1978), exact, over a kernel
matrix or over vectors whose similarities are computed as they are needed (no n x n matrix exists); k-centre; herding.
Does not know: where vectors or kernels come from.
"""

from __future__ import annotations

import heapq
from typing import Protocol

import numpy as np

Array = np.ndarray
BLOCK = 256
"""Candidates whose gains are computed at once."""


class Similarities(Protocol):
    """Similarities of candidates to all that is to be covered."""

    covered: int
    candidates: int

    def to(self, places: Array) -> Array:
        """Return ``(covered, len(places))`` fp32 similarities of some candidates."""


class OfMatrix:
    """A kernel: rows are covered, columns are candidates."""

    def __init__(self, kernel: Array) -> None:
        self._kernel = np.asarray(kernel, dtype=np.float32)
        self.covered, self.candidates = self._kernel.shape

    def to(self, places: Array) -> Array:
        return self._kernel[:, places]


class OfVectors:
    """Inner products, shifted to be no less than 0: ``(1 + <a, b>) / 2`` for unit vectors.

    Args:
        vectors: ``(n, d)`` fp32, unit length. covered: ``(m, d)``; left out: the vectors themselves.
    """

    def __init__(self, vectors: Array, covered: Array | None = None) -> None:
        self._vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self._covered = self._vectors if covered is None else np.ascontiguousarray(covered, dtype=np.float32)
        self.covered, self.candidates = len(self._covered), len(self._vectors)

    def to(self, places: Array) -> Array:
        found = self._covered @ self._vectors[places].T
        found += 1
        found *= 0.5
        return found


class FacilityLocation:
    """``f(A) = sum over i of cap_i(max over j in A of s_ij)``: every record should have a chosen one that is like it.

    Args:
        floor: ``(covered,)``: similarity that is had before anything is chosen; with the largest similarity to records that are known already this
            is the conditional gain. cap: ``(covered,)``: similarity that is of use at most; with the largest similarity to a target this is the
            mutual information.
    """

    def __init__(self, similarities: Similarities, floor: Array | None = None, cap: Array | None = None) -> None:
        self._similarities = similarities
        self._best = np.zeros(similarities.covered, dtype=np.float32) if floor is None else np.asarray(floor, np.float32).copy()
        self._cap = None if cap is None else np.asarray(cap, np.float32)
        self.candidates = similarities.candidates

    def gains(self, places: Array) -> Array:
        """Return how much each candidate would add now, ``(len(places),)`` float64."""
        found = self._similarities.to(places)
        if self._cap is not None:
            found = np.minimum(found, self._cap[:, None])
        return np.maximum(found - self._best[:, None], 0).sum(0, dtype=np.float64)

    def add(self, place: int) -> None:
        """Choose a candidate."""
        found = self._similarities.to(np.array([place]))[:, 0]
        if self._cap is not None:
            found = np.minimum(found, self._cap)
        np.maximum(self._best, found, out=self._best)


class Gains(Protocol):
    """A monotone submodular function that is being maximised."""

    candidates: int

    def gains(self, places: Array) -> Array: ...
    def add(self, place: int) -> None: ...


def lazy_greedy(function: Gains, count: int, order: Array | None = None) -> tuple[Array, Array]:
    """Return the greedy maximiser's choices ``(count,)`` in order, and their gains; ties by ``order``.

    A gain can only fall, so a candidate whose old gain is below another's new one need not be looked at again; the best old ones are looked at
    a block at a time.
    """
    order = np.arange(function.candidates) if order is None else order
    rank = np.empty(function.candidates, dtype=np.int64)
    rank[order] = np.arange(len(order))
    heap: list[tuple[float, int, int, int]] = []
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        heap += [
            (-gain, int(rank[place]), 0, int(place)) for gain, place in zip(function.gains(block).tolist(), block, strict=True)
        ]
    heapq.heapify(heap)
    chosen: list[int] = []
    gained: list[float] = []
    looked = 1
    while heap and len(chosen) < count:
        if heap[0][2] == len(chosen):
            gain, _, _, place = heapq.heappop(heap)
            function.add(place)
            chosen.append(place)
            gained.append(-gain)
            looked = 1
            continue
        stale: list[tuple[float, int, int, int]] = []
        while heap and len(stale) < looked and heap[0][2] != len(chosen):
            stale.append(heapq.heappop(heap))
        looked = min(2 * looked, BLOCK)
        fresh = function.gains(np.array([entry[3] for entry in stale]))
        for (_, ranked, _, place), gain in zip(stale, fresh.tolist(), strict=True):
            heapq.heappush(heap, (-gain, ranked, len(chosen), place))
    return np.array(chosen, dtype=np.int64), np.array(gained)


def k_centre(vectors: Array, count: int, first: int, chosen: Array | None = None) -> Array:
    """Return places so that each next one is the farthest from all before it (Gonzalez 1985); ties by place.

    Args:
        vectors: ``(n, d)``. first: the place to begin with. chosen: ``(m, d)`` vectors that are centres already.
    """
    vectors = np.asarray(vectors, dtype=np.float32)
    squares = (vectors**2).sum(1)

    def distances(centre: Array) -> Array:
        return np.maximum(squares - 2 * vectors @ centre + centre @ centre, 0)

    nearest = np.full(len(vectors), np.inf, dtype=np.float32)
    for centre in [] if chosen is None else chosen:
        nearest = np.minimum(nearest, distances(centre))
    places = [first if chosen is None else int(nearest.argmax())]
    nearest = np.minimum(nearest, distances(vectors[places[0]]))
    taken = np.zeros(len(vectors), dtype=bool)
    taken[places[0]] = True
    while len(places) < min(count, len(vectors)):
        place = int(np.where(taken, -1.0, nearest).argmax())
        places.append(place)
        taken[place] = True
        nearest = np.minimum(nearest, distances(vectors[place]))
    return np.array(places, dtype=np.int64)


def herding(vectors: Array, count: int, mean: Array | None = None) -> Array:
    """Return places whose running mean stays closest to the pool's mean (or another) (Welling 2009); none twice, ties by place."""
    vectors = np.asarray(vectors, dtype=np.float64)
    wanted = vectors.mean(0) if mean is None else np.asarray(mean, dtype=np.float64)
    state, taken, places = wanted.copy(), np.zeros(len(vectors), dtype=bool), []
    for _ in range(min(count, len(vectors))):
        place = int(np.where(taken, -np.inf, vectors @ state).argmax())
        places.append(place)
        taken[place] = True
        state += wanted - vectors[place]
    return np.array(places, dtype=np.int64)
