"""Diversity as a determinant: the most likely sets of a determinantal point process, greedily, and likely ones at random.

Knows: the greedy maximiser of ``log det(L_S)`` for ``L = q q^T * (V V^T + tau I)``, kept in the vectors' own dimension (no n x n and no n x k
matrix exists), the log-determinant of a set, how much less diverse some vectors are than others, and a draw of a k-DPP. Does not know: where
vectors and qualities come from.
"""

from __future__ import annotations

import numpy as np

from selectune.examples.factors.falling import Falling, highest_first

Array = np.ndarray


CHUNK = 8192
"""Vectors that are in fp64 at once."""


class _Spread(Falling):
    """Of each record ``v^T (tau I + V_S^T V_S)^-1 v``: what of it the chosen ones do not span; fp64, for it is a difference of large numbers."""

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


def draw(vectors: Array, count: int, generator: np.random.Generator) -> Array:
    """Return the places of a set drawn from the k-DPP of the kernel ``V V^T`` (Kulesza and Taskar 2012, the dual form), ``(count,)``.

    A set's probability is proportional to the squared volume that its vectors span, so no more can be drawn at once than the vectors have
    dimensions; a larger set is several draws, each from what the earlier ones left (no longer one k-DPP). Vectors of nothing come last.

    Args:
        vectors: ``(n, d)``.
    """
    vectors = np.asarray(vectors, dtype=np.float32)
    left, chosen = np.arange(len(vectors)), [np.empty(0, dtype=np.int64)]
    while len(left) and count > 0:
        some = vectors[left]
        values, basis = np.linalg.eigh((some.T @ some).astype(np.float64))
        spanned = values > 1e-6 * max(values.max(), 1e-12)
        size = min(count, int(spanned.sum()), len(left))
        if not size:
            chosen.append(left[:count])
            break
        kept = _eigenvectors(values[spanned], size, generator)
        lifted = some @ (basis[:, spanned][:, kept] / np.sqrt(values[spanned][kept])).astype(np.float32)
        places = _projected(lifted, generator)
        chosen.append(left[places])
        left, count = np.delete(left, places), count - size
    return np.concatenate(chosen)


def _eigenvectors(values: Array, size: int, generator: np.random.Generator) -> Array:
    """Which of the eigenvectors: so many, each set in proportion to the product of its values."""
    values = values / np.exp(np.log(values).mean())
    logs = np.full((size + 1, len(values) + 1), -np.inf)  # of the elementary symmetric polynomials of the first values
    logs[0] = 0
    for number, value in enumerate(np.log(values), start=1):
        logs[1:, number] = np.logaddexp(logs[1:, number - 1], value + logs[:-1, number - 1])
    kept = []
    for number in range(len(values), 0, -1):
        if size and np.log(generator.random()) < np.log(values[number - 1]) + logs[size - 1, number - 1] - logs[size, number]:
            kept.append(number - 1)
            size -= 1
    return np.array(kept)


def _projected(lifted: Array, generator: np.random.Generator) -> Array:
    """A draw from the process of orthonormal columns ``(n, k)``: k places, each where most of the columns is not spanned yet."""
    chances, spanned = (lifted.astype(np.float64) ** 2).sum(1), np.empty((0, lifted.shape[1]))
    places: list[int] = []
    for _ in range(lifted.shape[1]):
        chances[places] = 0
        sums = np.cumsum(np.maximum(chances, 0))
        places.append(int(np.searchsorted(sums, generator.random() * sums[-1], side="right").clip(0, len(sums) - 1)))
        new = lifted[places[-1]].astype(np.float64)
        for _ in range(2):  # once more, for rounding
            new = new - spanned.T @ (spanned @ new)
        spanned = np.vstack([spanned, new / max(float(np.linalg.norm(new)), 1e-12)])
        chances -= (lifted @ spanned[-1].astype(np.float32)).astype(np.float64) ** 2
    return np.array(places, dtype=np.int64)


def log_determinant(vectors: Array, tau: float = 1e-3) -> float:
    """Return ``log det(V V^T + tau I)`` of a set of ``n`` vectors, in nats, from their own dimension."""
    values = np.asarray(vectors, dtype=np.float64)
    count, dimension = values.shape
    small = values.T @ values if dimension < count else values @ values.T
    return float(np.linalg.slogdet(small + tau * np.eye(len(small)))[1] + max(count - dimension, 0) * np.log(tau))


def log_determinant_distance(
    vectors: Array, reference: Array, generator: np.random.Generator, draws: int = 5, tau: float = 1e-3
) -> float:
    """Return how much less diverse some vectors are than a reference of ``n``: ``(log det K_reference - log det K) / n``, nats a vector.

    Of more vectors than the reference has, so many are drawn, and the mean of several draws counts (2402.02318).

    Args:
        vectors: ``(m, d)``, m at least n. reference: ``(n, d)``.
    """
    count = len(reference)
    drawn = [vectors] if len(vectors) == count else [
        vectors[generator.choice(len(vectors), count, replace=False)] for _ in range(draws)
    ]  # fmt: skip
    return (log_determinant(reference, tau) - float(np.mean([log_determinant(some, tau) for some in drawn]))) / count
