"""Who is near whom: for each record that is to be covered, the candidates that are most like it.

Knows: how such lists are found without an n x n matrix, a tile at a time, and read a candidate at a time. Does not know: what they are used for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

Array = np.ndarray
TILE = (256, 4096)
"""Rows and columns whose similarities exist at once."""
SAMPLE = 4096
"""Candidates from which each row's threshold is estimated."""


class Similarities(Protocol):
    """Similarities of all that is to be covered (rows) to candidates (columns)."""

    covered: int
    candidates: int

    def to(self, places: Array, rows: Array | slice = slice(None)) -> Array:
        """Return ``(rows, len(places))`` fp32 similarities of some candidates; a fresh array."""

    def of(self, rows: Array) -> Similarities:
        """Return those of some rows only."""

    def totals(self) -> Array | None:
        """Return each candidate's similarity to all rows together, ``(candidates,)`` float64, where it is known without looking at pairs."""


@dataclass(frozen=True)
class Neighbours:
    """For each row the candidates above the row's threshold, kept by candidate."""

    thresholds: Array
    """``(covered,)`` fp32: every pair above it is kept, so whoever is served better than that need not know of any other."""
    starts: Array
    """``(candidates + 1,)`` int64: where a candidate's pairs begin."""
    rows: Array
    """``(pairs,)`` int32."""
    values: Array
    """``(pairs,)`` fp32 similarities."""

    def column(self, place: int) -> tuple[Array, Array]:
        """Return the rows that have a candidate on their lists, and their similarities to it."""
        span = slice(self.starts[place], self.starts[place + 1])
        return self.rows[span], self.values[span]

    def columns(self, places: Array) -> tuple[Array, Array, Array]:
        """Return the same of several candidates, one after the other, with whose pair (index into ``places``) each one is."""
        lengths = self.starts[places + 1] - self.starts[places]
        owners = np.repeat(np.arange(len(places)), lengths)
        spans = np.arange(len(owners)) + np.repeat(self.starts[places] - np.cumsum(lengths) + lengths, lengths)
        return owners, self.rows[spans], self.values[spans]


def neighbours(similarities: Similarities, about: int, best: Array, cap: Array | None = None) -> tuple[Neighbours, Array]:
    """Return about so many neighbours of every row, and what each candidate would add to ``best`` now, in one look at all pairs.

    The thresholds come from a sample of candidates, so lists differ in length (by a third, mostly); with repeated records, ties at the
    threshold are left out. Memory: 8 bytes a pair that is kept, twice while they are put in order, and one tile.

    Args:
        about: pairs that are kept for each row. best: ``(covered,)`` fp32, how well each row is served. cap: ``(covered,)`` at most of use.
    """
    from scipy.sparse import csr_matrix

    covered, candidates = similarities.covered, similarities.candidates
    some = np.random.default_rng(0).choice(candidates, min(SAMPLE, candidates), replace=False)
    rank = min(max(round(about * len(some) / candidates), 1), len(some))
    thresholds = np.empty(covered, dtype=np.float32)
    gains = np.zeros(candidates)
    lengths, places, values = [], [], []
    for start in range(0, covered, TILE[0]):
        rows = slice(start, min(start + TILE[0], covered))
        sampled = similarities.to(some, rows)
        limit = np.partition(sampled, len(some) - rank, axis=1)[:, len(some) - rank] + np.float32(1e-6)
        thresholds[rows] = limit
        found: list[tuple[Array, Array, Array]] = []
        for first in range(0, candidates, TILE[1]):
            columns = np.arange(first, min(first + TILE[1], candidates))
            tile = similarities.to(columns, rows)
            near = np.flatnonzero(tile > limit[:, None])
            found.append((near // len(columns), near % len(columns) + first, tile.ravel()[near]))
            gains[columns] += added(tile, best[rows], None if cap is None else cap[rows])
        row = np.concatenate([each[0] for each in found])
        by_row = np.argsort(row, kind="stable")
        lengths.append(np.bincount(row, minlength=len(limit)))
        places.append(np.concatenate([each[1] for each in found])[by_row].astype(np.int32))
        values.append(np.concatenate([each[2] for each in found])[by_row])
    ends = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    by_column = csr_matrix((np.concatenate(values), np.concatenate(places), ends), shape=(covered, candidates)).tocsc()
    kept = Neighbours(thresholds, by_column.indptr.astype(np.int64), by_column.indices.astype(np.int32), by_column.data)
    return kept, gains


def added(found: Array, best: Array, cap: Array | None) -> Array:
    """Return what each column adds to the best, summed over rows, float64; ``found`` is used up.

    Args:
        found: ``(rows, columns)`` fp32. best, cap: ``(rows,)``.
    """
    if cap is not None:
        np.minimum(found, cap[:, None], out=found)
    found -= best[:, None]
    np.maximum(found, 0, out=found)
    return found.sum(0).astype(np.float64)
