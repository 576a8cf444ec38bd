"""Coverage and diversity as submodular functions, maximised greedily.

Knows: facility location and its conditional-gain and mutual-information forms, the lazy greedy algorithm (Minoux 1978), exact up to rounding, over
a kernel matrix or over vectors whose similarities are computed as they are needed (no n x n matrix exists); k-centre; herding.
Does not know: where vectors or kernels come from.
"""

from __future__ import annotations

import heapq
from typing import Protocol

import numpy as np

from selectune.examples.factors.falling import Falling, highest_first
from selectune.examples.factors.neighbours import Neighbours, Similarities, added, neighbours

Array = np.ndarray
BLOCK = 256
"""Candidates whose gains are computed at once."""
FIRST_LOOK = 8
"""Of these, after a choice; then twice as many, and so on."""
ROWS = 1024
"""Rows whose similarities to a block exist at once."""
LISTED = 256
"""Neighbours that are kept for each record, in a large pool."""
PAIRS = 64_000_000
"""Neighbours that are kept in all: half a gigabyte."""
LARGE = 4096
"""Records from which on neighbours are kept."""


class OfMatrix:
    """A kernel: rows are covered, columns are candidates."""

    def __init__(self, kernel: Array) -> None:
        self._kernel = np.asarray(kernel, dtype=np.float32)
        self.covered, self.candidates = self._kernel.shape

    def to(self, places: Array, rows: Array | slice = slice(None)) -> Array:
        return self._kernel[rows][:, places]

    def of(self, rows: Array) -> OfMatrix:
        return OfMatrix(self._kernel[rows])

    def totals(self) -> Array | None:
        return self._kernel.sum(0, dtype=np.float64) if self._kernel.size and self._kernel.min() >= 0 else None


class OfVectors:
    """Inner products, shifted to be no less than 0: ``(1 + <a, b>) / 2`` for unit vectors.

    Args:
        vectors: ``(n, d)`` fp32, unit length. covered: ``(m, d)``; left out: the vectors themselves.
    """

    def __init__(self, vectors: Array, covered: Array | None = None) -> None:
        self._vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self._covered = self._vectors if covered is None else np.ascontiguousarray(covered, dtype=np.float32)
        self.covered, self.candidates = len(self._covered), len(self._vectors)

    def to(self, places: Array, rows: Array | slice = slice(None)) -> Array:
        found = self._covered[rows] @ self._vectors[places].T
        found += 1
        found *= 0.5
        return found

    def of(self, rows: Array) -> OfVectors:
        return OfVectors(self._vectors, self._covered[rows])

    def totals(self) -> Array | None:
        longest = [float(np.einsum("ij,ij->i", some, some).max(initial=0)) for some in (self._covered, self._vectors)]
        if longest[0] * longest[1] > 1.001:
            return None  # some similarities may be negative
        return (self.covered + self._vectors @ self._covered.sum(0, dtype=np.float64).astype(np.float32)).astype(np.float64) / 2


class FacilityLocation:
    """``f(A) = sum over i of cap_i(max over j in A of s_ij)``: every record should have a chosen one that is like it.

    Of a large pool's records, the nearest candidates are kept: a record that is served at least as well as the last of them would serve it
    is settled, and only its list is read from then on. What is not settled is computed anew, so that gains are exact throughout.

    Args:
        floor: ``(covered,)``: similarity that is had before anything is chosen; with the largest similarity to records that are known already this
            is the conditional gain. cap: ``(covered,)``: similarity that is of use at most; with the largest similarity to a target this is the
            mutual information. listed: neighbours that are kept for each record; 0: none.
    """

    def __init__(
        self, similarities: Similarities, floor: Array | None = None, cap: Array | None = None, listed: int | None = None
    ) -> None:
        self._similarities, self.candidates = similarities, similarities.candidates
        self._best = np.zeros(similarities.covered, dtype=np.float32) if floor is None else np.asarray(floor, np.float32).copy()
        self._cap = None if cap is None else np.asarray(cap, np.float32)
        large = similarities.covered >= LARGE and similarities.candidates >= LARGE
        self._listed = min(LISTED, PAIRS // similarities.covered) * large if listed is None else listed
        self._lists: Neighbours | None = None
        self._limits = np.full(similarities.covered, np.inf, dtype=np.float32)
        self._now = similarities.totals() if floor is None and cap is None else None
        self._open, self._dense = np.arange(similarities.covered), similarities  # rows that are computed
        self._settled = np.full(similarities.covered, np.inf, dtype=np.float32)  # what serves the others

    def gains(self, places: Array) -> Array:
        """Return how much each candidate would add now, ``(len(places),)`` float64."""
        if self._now is None and self._listed and self._lists is None:
            self._lists, self._now = neighbours(self._similarities, self._listed, self._best, self._cap)
            self._limits = self._lists.thresholds if self._cap is None else np.minimum(self._lists.thresholds, self._cap)
            self._settle()
        if self._now is not None:
            return self._now[places]
        found = np.zeros(len(places))
        for start in range(0, len(self._open), ROWS):
            rows = slice(start, start + ROWS)
            own = self._open[rows]
            found += added(self._dense.to(places, rows), self._best[own], None if self._cap is None else self._cap[own])
        if self._lists is not None:
            owners, rows_of, values = self._lists.columns(places)
            if self._cap is not None:
                values = np.minimum(values, self._cap[rows_of])
            found += np.bincount(owners, np.maximum(values - self._settled[rows_of], 0), minlength=len(places))
        return found

    def add(self, place: int) -> None:
        """Choose a candidate."""
        found = self._dense.to(np.array([place]))[:, 0]
        if self._cap is not None:
            found = np.minimum(found, self._cap[self._open])
        self._best[self._open] = np.maximum(self._best[self._open], found)
        self._now = None
        if self._lists is not None:
            rows, values = self._lists.column(place)
            if self._cap is not None:
                values = np.minimum(values, self._cap[rows])
            self._best[rows] = np.maximum(self._best[rows], values)
            self._settled[rows] = np.where(self._settled[rows] < np.inf, self._best[rows], np.inf)
            self._settle()

    def _settle(self) -> None:
        """Take the rows that are served well enough from those that are computed, when they have become a fifth of them."""
        still = self._best[self._open] < self._limits[self._open]
        if len(self._open) and still.mean() <= 0.8:
            self._dense = self._dense.of(np.flatnonzero(still))
            self._settled[self._open[~still]] = self._best[self._open[~still]]
            self._open = self._open[still]


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
    looked = FIRST_LOOK
    while heap and len(chosen) < count:
        if heap[0][2] == len(chosen):
            gain, _, _, place = heapq.heappop(heap)
            function.add(place)
            chosen.append(place)
            gained.append(-gain)
            looked = FIRST_LOOK
            continue
        stale: list[tuple[float, int, int, int]] = []
        while heap and len(stale) < looked and heap[0][2] != len(chosen):
            stale.append(heapq.heappop(heap))
        looked = min(2 * looked, BLOCK)
        fresh = function.gains(np.array([entry[3] for entry in stale]))
        for (_, ranked, _, place), gain in zip(stale, fresh.tolist(), strict=True):
            heapq.heappush(heap, (-gain, ranked, len(chosen), place))
    return np.array(chosen, dtype=np.int64), np.array(gained)


def coverage(vectors: Array, count: int, block: int = 100_000, seed: int = 0) -> tuple[Array, Array]:
    """Return places by greedy facility location over vectors ``(count,)``, in order, and their gains.

    Up to ``block`` records the greedy choice is exact. More are put into blocks at random, and each covers itself with its share: time and memory
    then grow with the records and not with their square.

    Args:
        vectors: ``(n, d)`` fp32, unit length.
    """
    parts = max(1, -(-len(vectors) // block))
    mixed = np.arange(len(vectors)) if parts == 1 else np.random.default_rng(seed).permutation(len(vectors))
    found: list[tuple[Array, Array]] = []
    met = 0
    for part in np.array_split(mixed, parts):
        own, before = np.sort(part), met * count // len(vectors)
        met += len(part)
        share = met * count // len(vectors) - before
        places, gains = lazy_greedy(FacilityLocation(OfVectors(vectors[own])), share)
        found.append((own[places], gains))
    in_turn = np.argsort(np.concatenate([np.arange(len(places)) for places, _ in found]), kind="stable")
    return np.concatenate([places for places, _ in found])[in_turn], np.concatenate([gains for _, gains in found])[in_turn]


class _Distances(Falling):
    """Squared distances to the nearest centre."""

    def __init__(self, vectors: Array) -> None:
        self._vectors, self._squares = vectors, np.einsum("ij,ij->i", vectors, vectors)

    def of(self, places: Array) -> _Distances:
        return _Distances(self._vectors[places])

    def take(self, place: int) -> Array:
        return self._vectors[place]

    def lowered(self, state: Array, vectors: Array) -> Array:
        nearest = ((vectors**2).sum(1) - 2 * (self._vectors @ vectors.T)).min(1)
        return np.minimum(state, np.maximum(self._squares + nearest, 0))


def k_centre(vectors: Array, count: int, first: int, chosen: Array | None = None) -> Array:
    """Return places so that each next one is the farthest from all before it (Gonzalez 1985); ties by place.

    Args:
        vectors: ``(n, d)``. first: the place to begin with. chosen: ``(m, d)`` vectors that are centres already; then ``first`` is not used.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    distances, nearest = _Distances(vectors), np.full(len(vectors), np.inf, dtype=np.float32)
    if chosen is None:
        nearest[np.arange(len(vectors)) != first] = np.finfo(np.float32).max
    for centre in [] if chosen is None else np.asarray(chosen, dtype=np.float32):
        nearest = distances.lowered(nearest, centre[None])
    return highest_first(distances, nearest, count)[0]


def herding(vectors: Array, count: int, mean: Array | None = None) -> Array:
    """Return places whose running mean stays closest to the pool's mean (or another) (Welling 2009); none twice, ties by place."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    wanted = vectors.mean(0, dtype=np.float64) if mean is None else np.asarray(mean, dtype=np.float64)
    state, taken, places = wanted.copy(), np.zeros(len(vectors), dtype=bool), []
    for _ in range(min(count, len(vectors))):
        place = int(np.where(taken, -np.inf, vectors @ state.astype(np.float32)).argmax())
        places.append(place)
        taken[place] = True
        state += wanted - vectors[place]
    return np.array(places, dtype=np.int64)
