"""The empirical neural tangent kernel of a base, between a pool and a target.

Knows: which functions of the base the kernel is of (the log-likelihood of each label, or of a record's own response), and its sums over sketches of
their gradients. Does not know: what is regressed on it. A pool of n records needs n x n numbers: only for pools that a method may refuse.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from selectune.data.records import Record
from selectune.examples.factors.labels import answered
from selectune.examples.factors.signals import GradientSketch
from selectune.examples.factors.store import measure
from selectune.examples.pool import Pool

Array = np.ndarray


def empirical_kernel(
    pool: Pool, records: Sequence[Record], target: Sequence[Record], labels: int | None, dimension: int
) -> tuple[Array, Array]:
    """Return the kernel among records ``(n, n)`` and of target records with them ``(m, n)``, float64.

    One kernel is shared by all labels, the mean over the labels' functions; without labels it is that of the mean log-likelihood of a record's
    response.

    Args:
        labels: how many each record may be answered with. dimension: of the gradients' sketch.
    """
    own, cross = np.zeros((len(records), len(records))), np.zeros((len(target), len(records)))
    signal = GradientSketch(dimension=dimension, unit=False)
    for label in range(labels or 1):
        near, far = (
            measure(pool, signal, [answered(record, label) for record in some] if labels else some).astype(np.float64)
            for some in (list(records), list(target))
        )
        own += near @ near.T / (labels or 1)
        cross += far @ near.T / (labels or 1)
    return own, cross
