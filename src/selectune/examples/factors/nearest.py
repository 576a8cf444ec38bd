"""The few vectors that are most like each query, exactly.

Knows: how they are found block after block, so that no matrix of all pairs is ever made. Does not know: what vectors mean.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
ENTRIES = 1 << 24
"""Similarities in memory at once."""


def nearest(queries: Array, vectors: Array, count: int, themselves: bool = False) -> tuple[Array, Array]:
    """Return the places of the vectors with the largest inner products with each query, and these; ``(queries, count)`` int64 and fp32.

    Fewer where there are fewer vectors. The nearest come first, ties by place.

    Args:
        queries, vectors: ``(n, d)`` float32. themselves: the queries are the vectors, and none is its own neighbour.
    """
    count = min(count, len(vectors) - themselves)
    if count < 1:
        return np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    places, found = [np.empty((0, count), np.int64)], [np.empty((0, count), np.float32)]
    block = max(1, ENTRIES // len(vectors))
    for start in range(0, len(queries), block):
        likeness = queries[start : start + block] @ vectors.T
        rows = np.arange(len(likeness))
        if themselves:
            likeness[rows, rows + start] = -np.inf
        limits = np.partition(likeness, -count, axis=1)[:, -count]
        best = np.stack([_first(row, np.flatnonzero(row >= limit), count) for row, limit in zip(likeness, limits, strict=True)])
        places.append(best)
        found.append(likeness[rows[:, None], best])
    return np.concatenate(places), np.concatenate(found)


def _first(row: Array, candidates: Array, count: int) -> Array:
    return candidates[np.argsort(-row[candidates], kind="stable")[:count]]
