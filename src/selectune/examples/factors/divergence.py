"""How far apart are two domains? Divergences between two sets of texts, as vectors or as words.

Knows: measures between sets of vectors (cosine of means, MMD, CORAL, energy distance, sliced Wasserstein) and between distributions of words
(Kullback-Leibler, Rényi, Jensen-Shannon). Does not know: where vectors come from, or what is done with a divergence.

Each is 0 for a set and itself and no less for two; all but Kullback-Leibler and Rényi are symmetric.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

Array = np.ndarray
SMOOTHING = 0.1
"""Added to the count of every word that either domain has, so that a word of one alone is rare in the other and not impossible."""
ORDER = 0.99
"""Of Rényi's divergence; 1 would be Kullback and Leibler's."""


def centred(domains: Sequence[Array]) -> list[Array]:
    """Return vectors of several domains less the mean of the domains' means (vectors of a language model all point one way).

    Two domains alone stay as they are: around their common mean they would lie opposite each other, however alike.
    """
    if len(domains) < 3:
        return list(domains)
    middle = np.mean([vectors.mean(0) for vectors in domains], axis=0)
    return [vectors - middle for vectors in domains]


def cosine(one: Array, other: Array) -> float:
    """Return one minus the cosine of the two means."""
    a, b = one.mean(0, dtype=np.float64), other.mean(0, dtype=np.float64)
    return _no_less(1 - float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12))


def maximum_mean_discrepancy(one: Array, other: Array) -> float:
    """Return the squared discrepancy under a Gaussian kernel (Gretton et al. 2012), each pair counted, a vector with itself too.

    The kernel's width is the median distance of the pooled vectors.
    """
    between, within, also_within = _squares(one, other), _squares(one, one), _squares(other, other)
    both = np.concatenate([squares.ravel() for squares in (within, between, between, also_within)])
    width = float(np.median(both[both > 1e-12])) if (both > 1e-12).any() else 1.0
    kernel = [float(np.exp(-squares / width).mean()) for squares in (within, also_within, between)]
    return _no_less(kernel[0] + kernel[1] - 2 * kernel[2])


def coral(one: Array, other: Array) -> float:
    """Return the squared Frobenius distance of the two covariances over ``4 d^2`` (Sun and Saenko 2016); a mean that moves does not count."""
    covariances = [np.cov(vectors.astype(np.float64), rowvar=False, bias=True) for vectors in (one, other)]
    return float(((covariances[0] - covariances[1]) ** 2).sum()) / (4 * one.shape[1] ** 2)


def energy(one: Array, other: Array) -> float:
    """Return the energy distance, ``2 E|x - y| - E|x - x'| - E|y - y'|`` (Székely and Rizzo 2013)."""
    means = [float(np.sqrt(_squares(a, b)).mean()) for a, b in ((one, other), (one, one), (other, other))]
    return _no_less(2 * means[0] - means[1] - means[2])


def wasserstein(one: Array, other: Array, directions: int = 128) -> float:
    """Return the sliced 2-Wasserstein distance: optimal transport along random directions, the same ones for every pair of domains."""
    import ot

    return float(
        ot.sliced_wasserstein_distance(one.astype(np.float64), other.astype(np.float64), n_projections=directions, seed=0)
    )


def kullback_leibler(one: Array, other: Array) -> float:
    """Return ``sum p log(p / q)`` of two distributions, in nats."""
    return _no_less(float((one * np.log(one / other)).sum()))


def renyi(one: Array, other: Array, order: float = ORDER) -> float:
    """Return Rényi's divergence ``log(sum p^a q^(1 - a)) / (a - 1)`` of two distributions, in nats."""
    return _no_less(float(np.log((one**order * other ** (1 - order)).sum()) / (order - 1)))


def jensen_shannon(one: Array, other: Array) -> float:
    """Return the mean divergence of two distributions from their mean, in nats: at most log 2."""
    mean = (one + other) / 2
    return (kullback_leibler(one, mean) + kullback_leibler(other, mean)) / 2


OF_VECTORS: dict[str, Callable[[Array, Array], float]] = {
    "mmd": maximum_mean_discrepancy, "cosine": cosine, "coral": coral, "energy": energy, "wasserstein": wasserstein,
}  # fmt: skip
OF_WORDS: dict[str, Callable[[Array, Array], float]] = {
    "jensen_shannon": jensen_shannon, "renyi": renyi, "kullback_leibler": kullback_leibler,
}  # fmt: skip


def words(texts: Iterable[str]) -> Counter[str]:
    """Count the words of some texts, lower case."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"\w+", text.lower()))
    return counts


def distributions(one: Counter[str], other: Counter[str]) -> tuple[Array, Array]:
    """Return two distributions over the words of both, smoothed: ``(vocabulary,)`` float64 each."""
    vocabulary = sorted(one.keys() | other.keys()) or [""]
    found = [np.array([counts[word] for word in vocabulary], dtype=np.float64) + SMOOTHING for counts in (one, other)]
    return found[0] / found[0].sum(), found[1] / found[1].sum()


def _squares(one: Array, other: Array) -> Array:
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(one.astype(np.float64), other.astype(np.float64), "sqeuclidean"))


def _no_less(value: float) -> float:
    """Return a value that rounding alone can have put below zero."""
    return max(value, 0.0)
