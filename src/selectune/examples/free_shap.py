"""Shapley values of records without any training: kernel regression stands for fine-tuning.

Knows: what every beginning of an order of records predicts at the target, all beginnings at once, and the mean gain of each record over many orders.
Does not know: how gradients are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from scipy.linalg import cholesky, solve_triangular

from selectune.errors import UserError
from selectune.examples.factors.empirical_kernel import empirical_kernel
from selectune.examples.factors.labels import shared_labels
from selectune.examples.factors.signals import ResponseLoss
from selectune.examples.factors.store import measure
from selectune.examples.method import Array, Ranked, something_trains
from selectune.examples.pool import Pool
from selectune.progress import watched

BLOCK = 64
"""Beginnings whose predictions are held at once."""
Utility = Callable[[Array], Array]
"""From predictions ``(beginnings, m, outputs)`` to the worth of each beginning ``(beginnings,)``."""


def predictions(kernel: Array, cross: Array, wanted: Array, ridge: float) -> Iterator[Array]:
    """Give the ridge regression's predictions at m points from the first, the first two, ... of n records, in blocks ``(beginnings, m, outputs)``.

    With ``L`` the Cholesky factor of ``K + ridge I``, whose leading blocks are the factors of all beginnings, the predictions of the first s records
    are the sum over t <= s of ``(L^-1 K_cross^T)_t (L^-1 y)_t``: one factorisation serves all of them.

    Args:
        kernel: ``(n, n)``. cross: ``(m, n)``. wanted: ``(n, outputs)``.
    """
    factor = cholesky(kernel + ridge * np.eye(len(kernel)), lower=True)
    states = solve_triangular(factor, np.concatenate([cross.T, wanted], axis=1), lower=True)
    left, right = states[:, : len(cross)], states[:, len(cross) :]
    total = np.zeros((len(cross), wanted.shape[1]))
    for start in range(0, len(kernel), BLOCK):
        steps = left[start : start + BLOCK, :, None] * right[start : start + BLOCK, None, :]
        yield total + np.cumsum(steps, axis=0)
        total = total + steps.sum(0)


def shapley_values(
    kernel: Array, cross: Array, wanted: Array, utility: Utility, empty: float, ridge: float, orders: Iterable[Array]
) -> Array:
    """Return each record's gain in utility when it joins those before it, averaged over orders; ``(n,)``.

    The values add up to the utility of all records less ``empty``, that of none.
    """
    gained, count = np.zeros(len(kernel)), 0
    for order in orders:
        made = predictions(kernel[np.ix_(order, order)], cross[:, order], wanted[order], ridge)
        worth = np.concatenate([[empty], *(utility(block) for block in made)])
        gained[order] += np.diff(worth)
        count += 1
    return gained / max(count, 1)


def accuracy(answers: Array) -> Utility:
    """Return the share of the largest predictions that are the answers; ``answers``: ``(m,)`` int64."""
    return lambda found: (found.argmax(-1) == answers).mean(-1)


def likelihood(answers: Array) -> Utility:
    """Return the mean log-likelihood of the answers, predictions being logits."""

    def worth(found: Array) -> Array:
        said = np.take_along_axis(found, answers[None, :, None], axis=-1)[..., 0]
        return (said - np.logaddexp.reduce(found, axis=-1)).mean(-1)

    return worth


def explained(losses: Array) -> Utility:
    """Return the share of the target's squared losses that predicted drops take away; 0 when nothing is predicted, 1 when all is right."""
    whole = max(float((losses**2).sum()), 1e-12)
    return lambda found: 1 - ((losses - found[..., 0]) ** 2).sum(-1) / whole


class ShapleyValue(Ranked):
    """The records with the largest Shapley value for what a kernel regression, in place of a training, does at the target."""

    name: ClassVar[str] = "free_shap"
    family: ClassVar[str] = "target"
    paper: ClassVar[str] = (
        "Helpful or Harmful Data? Fine-tuning-free Shapley Attribution for Explaining Language Model Predictions, ICML 2024, arXiv 2406.04606"
    )
    summary: ClassVar[str] = "The largest Shapley values under regression on the base's empirical tangent kernel."
    departs: ClassVar[str] = (
        "The kernel is of log-likelihoods of labels, over sketched gradients of all blocks; every beginning of an order comes out of one Cholesky "
        "factor, so that no order is cut short. Records without a common set of labels, which the paper leaves out, are worth what they take away of "
        "the target's losses."
    )
    needs_target: ClassVar[bool] = True

    permutations: Annotated[int, Field(gt=0)] = 200
    """Random orders of the records."""
    utility: Literal["accuracy", "likelihood"] = "accuracy"
    """What a set of records is worth, where records have labels: right answers at the target, or their log-likelihood."""
    ridge: Annotated[float, Field(ge=1e-8)] = 1e-3
    """Of the regression, as a share of the kernel's mean diagonal (the paper: 1e-6, absolute)."""
    dimension: Annotated[int, Field(gt=0)] = 4096
    """Of the gradients' sketch."""
    most: Annotated[int, Field(gt=0)] = 5000
    """Larger pools are refused: the kernel grows with the square, the work with the cube."""

    def score(self, pool: Pool) -> dict[str, Array]:
        if len(pool) > self.most:
            raise UserError(f"{len(pool):,} records make a kernel of {len(pool) ** 2:,} numbers", field="examples.most",
                            expected=f"a pool of at most {self.most:,}", mend="choose by another method first, or raise it")  # fmt: skip
        records, target = [pool.records[place] for place in pool.order], list(pool.target)
        something_trains(pool)
        something_trains(pool.of(target), "target's ")
        labels = shared_labels([*records, *target])
        kernel, cross = empirical_kernel(pool, records, target, len(labels) if labels else None, self.dimension)
        if labels:
            wanted = np.eye(len(labels))[[record.answer for record in records]]
            answers = np.array([record.answer for record in target])
            utility = accuracy(answers) if self.utility == "accuracy" else likelihood(answers)
            empty = 1 / len(labels) if self.utility == "accuracy" else -float(np.log(len(labels)))
        else:
            if self.utility == "likelihood" or any(record.choices for record in (*records, *target)):
                pool.notes.append("records and target have no set of labels in common: values are shares of the target's losses")
            losses = [np.nan_to_num(measure(pool, ResponseLoss(), some)) for some in (records, target)]
            wanted, utility, empty = losses[0][:, None], explained(losses[1]), 0.0
        scale = max(float(kernel.diagonal().mean()), 1e-12)
        generator = pool.generator("free_shap")
        orders = (generator.permutation(len(records)) for _ in watched(range(self.permutations), "orders", pool.quiet))
        values = np.empty(len(records))
        found = shapley_values(kernel, cross, wanted, utility, empty, self.ridge * scale, orders)
        values[pool.order] = np.where(kernel.diagonal() > 0, found, np.nan)  # of the others nothing trains
        return {"Shapley value": values}
