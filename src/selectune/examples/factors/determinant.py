"""Diversity as a determinant: the most likely sets of a determinantal point process, greedily.

Knows: the greedy maximiser of ``log det(L_S)`` for ``L = q q^T * (V V^T + tau I)``, kept in the vectors' own dimension (no n x n and no n x k
matrix exists), and the log-determinant of a set. Does not know: where vectors and qualities come from.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def greedy_determinant(vectors: Array, count: int, quality: Array | None = None, tau: float = 1e-3) -> tuple[Array, Array]:
    """Return places in the order in which they add most to ``log det``, and what each adds, in nats.

    With the chosen vectors ``V_S``, candidate ``j`` adds ``log(tau + tau * v_j^T (tau I + V_S^T V_S)^-1 v_j) + 2 log q_j``; the inverse is updated by
    one rank a step (Sherman and Morrison), fp64.

    Args:
        vectors: ``(n, d)``. quality: ``(n,)`` positive. tau: ridge; also what a repetition still adds (its logarithm).
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    dimension = vectors.shape[1]
    inverse = np.eye(dimension) / tau
    spread = (vectors.astype(np.float64) ** 2).sum(1) / tau  # v^T inverse v
    bonus = np.zeros(len(vectors)) if quality is None else 2 * np.log(np.asarray(quality, dtype=np.float64))
    taken = np.zeros(len(vectors), dtype=bool)
    places, gained = [], []
    for _ in range(min(count, len(vectors))):
        gains = np.where(taken, -np.inf, np.log(tau) + np.log1p(np.maximum(spread, 0)) + bonus)
        place = int(gains.argmax())
        places.append(place)
        gained.append(float(gains[place]))
        taken[place] = True
        chosen = vectors[place].astype(np.float64)
        moved = inverse @ chosen
        scale = 1 + chosen @ moved
        inverse -= np.outer(moved, moved) / scale
        spread -= (vectors @ moved.astype(np.float32)).astype(np.float64) ** 2 / scale
    return np.array(places, dtype=np.int64), np.array(gained)


def log_determinant(vectors: Array, tau: float = 1e-3) -> float:
    """Return ``log det(V V^T + tau I)`` of a set of ``n`` vectors, in nats, from their own dimension."""
    values = np.asarray(vectors, dtype=np.float64)
    count, dimension = values.shape
    small = values.T @ values if dimension < count else values @ values.T
    return float(np.linalg.slogdet(small + tau * np.eye(len(small)))[1] + max(count - dimension, 0) * np.log(tau))
