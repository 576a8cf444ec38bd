"""Groups of records and fair shares of them.

Knows: k-means, how a budget is shared among groups from the smallest up, and how groups are filled. Does not know: what the groups mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def k_means(points: Array, clusters: int, seed: int, order: Array | None = None) -> tuple[Array, Array]:
    """Return the cluster of each point ``(n,)`` and the centres ``(clusters, d)``; with fewer distinct points, fewer clusters.

    Above 20,000 points centres come from mini-batches.

    Args:
        points: ``(n, d)`` float32. order: an order of the points that does not depend on their places, for results that do not either.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    order = np.arange(len(points)) if order is None else order
    sorted_points = np.ascontiguousarray(points[order], dtype=np.float32)
    clusters = min(clusters, len(np.unique(sorted_points, axis=0)))
    kind = KMeans if len(points) <= 20_000 else MiniBatchKMeans
    options = {} if kind is KMeans else {"batch_size": 4096}
    found = kind(n_clusters=clusters, n_init=5, random_state=seed, **options).fit(sorted_points)
    labels = np.empty(len(points), dtype=np.int64)
    labels[order] = found.labels_
    return labels, found.cluster_centers_


def fair_shares(sizes: Sequence[int], budget: int) -> list[int]:
    """Share a budget among groups: from the smallest up, each at most an equal part of what is left; what it cannot use goes on.

    Ties by index. The shares add up to the budget, or to all there is.
    """
    shares, left = [0] * len(sizes), min(budget, sum(sizes))
    order = sorted(range(len(sizes)), key=lambda group: (sizes[group], group))
    for done, group in enumerate(order):
        shares[group] = min(sizes[group], left // (len(order) - done))
        left -= shares[group]
    for group in reversed(order):  # what whole division left over
        more = min(left, sizes[group] - shares[group])
        shares[group] += more
        left -= more
    return shares


def proportional_shares(sizes: Sequence[float], budget: int, most: Sequence[int]) -> list[int]:
    """Share a budget in proportion, by largest remainders, each at most what there is."""
    from selectune.parameters.factors.allocation import apportion

    return apportion(budget, sizes, most)


def members(labels: Array, ranking: Array) -> list[Array]:
    """Return the places of each group, each in the order of a ranking of all."""
    groups = sorted(set(labels.tolist()))
    return [ranking[labels[ranking] == group] for group in groups]


def round_robin(groups: Sequence[Array], shares: Sequence[int]) -> Array:
    """Return the first of every group, then the second of every group, and so on, as many of each as its share, then all that is left.

    Whoever takes a beginning of the result takes from every group alike.
    """
    first = [(rank, number, place) for number, (group, share) in enumerate(zip(groups, shares, strict=True))
             for rank, place in enumerate(group[:share].tolist())]  # fmt: skip
    rest = [place for group, share in zip(groups, shares, strict=True) for place in group[share:].tolist()]
    return np.array([place for _, _, place in sorted(first)] + rest, dtype=np.int64)
