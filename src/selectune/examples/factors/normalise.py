"""Scores on a common scale. Knows: minimum-maximum, standard scores, rank percentiles, unit length. Does not know: what is scored."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def minimum_maximum(values: Array) -> Array:
    """Return values on 0 to 1; a constant becomes 0; what is not finite stays."""
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.max() == finite.min():
        return np.where(np.isfinite(values), 0.0, values)
    return (values - finite.min()) / (finite.max() - finite.min())


def standard(values: Array) -> Array:
    """Return (value - mean) / standard deviation (of the population); a constant becomes 0; what is not finite stays."""
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.max() == finite.min():  # a constant's deviation may be a little above 0
        return np.where(np.isfinite(values), 0.0, values)
    return (values - finite.mean()) / finite.std()


def percentile_ranks(values: Array) -> Array:
    """Return ranks from 0 (lowest) to 1 (highest), ``(n,)``; equal values share the mean of their ranks; what is not finite ranks lowest."""
    from scipy.stats import rankdata  # takes a second to load

    return (rankdata(np.where(np.isfinite(values), values, -np.inf)) - 1) / max(len(values) - 1, 1)


def unit(vectors: Array) -> Array:
    """Return vectors scaled to unit length, ``(n, d)``; a vector of zeros stays."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def topsis(columns: Array, costs: tuple[bool, ...], weights: tuple[float, ...] | None = None) -> Array:
    """Return each row's closeness to the ideal, 0 to 1, higher is better (TOPSIS, Hwang and Yoon 1981).

    Args:
        columns: ``(rows, criteria)``. costs: which criteria are better low. weights: of the criteria, equal when left out.
    """
    norms = np.linalg.norm(columns, axis=0)
    scaled = columns / np.where(norms > 0, norms, 1) * np.asarray(weights or (1 / columns.shape[1],) * columns.shape[1])
    best = np.where(costs, scaled.min(0), scaled.max(0))
    worst = np.where(costs, scaled.max(0), scaled.min(0))
    to_best, to_worst = np.linalg.norm(scaled - best, axis=1), np.linalg.norm(scaled - worst, axis=1)
    total = to_best + to_worst
    return np.where(total > 0, to_worst / np.where(total > 0, total, 1), 0.5)
