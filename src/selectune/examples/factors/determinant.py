"""Diversity as a determinant: the most likely sets of a determinantal point process, greedily, and likely ones at random.

Knows: the greedy maximiser of ``log det(L_S)`` for ``L = q q^T * (V V^T + tau I)``, kept in the vectors' own dimension (no n x n and no n x k
matrix exists), the log-determinant of a set, and a draw of a k-DPP. Does not know: where vectors and qualities come from.
"""

from __future__ import annotations

import numpy as np

from selectune.examples.factors.falling import Falling, highest_first

Array = np.ndarray


CHUNK = 8192
"""Vectors that are in fp64 at once."""


class _Spread(Falling):
    """Of each record ``v^T (tau I + V_S^T V_S)^-1 v``: what of it the chosen ones do not span. In fp64: what is left is a difference of large numbers."""

    def __init__(self, vectors: Array, bonus: Array, tau: float) -> None:
        self._vectors, self._bonus, self._tau = vectors, bonus, tau
        self._inverse = np.eye(vectors.shape[1]) / tau

    def of(self, places: Array) -> _Spread:
        return _Spread(self._vectors[places].astype(np.float64), self._bonus[places], self._tau)

    def take(self, place: int) -> Array:
        chosen = self._vectors[place].astype(np.float64)
        moved = self._inverse @ chosen
        moved /= np.sqrt(1 + chosen @ moved)
        self._inverse -= np.outer(moved, moved)
        return moved

    def lowered(self, state: Array, vectors: Array) -> Array:
        left = state.copy()
        for start in range(0, len(left), CHUNK):
            some = slice(start, start + CHUNK)
            left[some] -= ((self._vectors[some].astype(np.float64, copy=False) @ vectors.T) ** 2).sum(1)
        return left

    def heights(self, state: Array) -> Array:
        return np.log(self._tau) + np.log1p(np.maximum(state, 0)) + self._bonus


def greedy_determinant(vectors: Array, count: int, quality: Array | None = None, tau: float = 1e-3) -> tuple[Array, Array]:
    """Return places in the order in which they add most to ``log det``, and what each adds, in nats.

    With the chosen vectors ``V_S``, candidate ``j`` adds ``log(tau + tau * v_j^T (tau I + V_S^T V_S)^-1 v_j) + 2 log q_j``; the inverse is updated by
    one rank a step (Sherman and Morrison), fp64.

    Args:
        vectors: ``(n, d)``. quality: ``(n,)`` positive. tau: ridge; also what a repetition still adds (its logarithm).
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    bonus = np.zeros(len(vectors)) if quality is None else 2 * np.log(np.asarray(quality, dtype=np.float64))
    spread = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64) / tau
    return highest_first(_Spread(vectors, bonus, tau), spread, count)


def log_determinant(vectors: Array, tau: float = 1e-3) -> float:
    """Return ``log det(V V^T + tau I)`` of a set of ``n`` vectors, in nats, from their own dimension."""
    values = np.asarray(vectors, dtype=np.float64)
    count, dimension = values.shape
    small = values.T @ values if dimension < count else values @ values.T
    return float(np.linalg.slogdet(small + tau * np.eye(len(small)))[1] + max(count - dimension, 0) * np.log(tau))
