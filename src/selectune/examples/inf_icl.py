"""Influence of records on the target through a linear probe of the base's embeddings (InfICL).

Knows: a regularised softmax classifier, its inverse Hessian by conjugate gradients, each record's influence on the target's loss, and equal shares of
classes. Does not know: how records are embedded.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from scipy.optimize import minimize
from scipy.sparse.linalg import LinearOperator, cg

from selectune.examples.diverse import Embedded
from selectune.examples.factors.labels import shared_labels
from selectune.examples.factors.signals import SentenceEmbedding
from selectune.examples.factors.store import measure
from selectune.examples.factors.strata import fair_shares, k_means, members, round_robin
from selectune.examples.method import Array, Choice, ranked
from selectune.examples.pool import Pool

BLOCK = 65_536
"""Records whose gradients are looked at together."""


class Probe:
    """A softmax classifier with an L2 penalty ``weight / 2 |theta|^2`` on the mean cross-entropy, fitted to its optimum.

    Args:
        features: ``(n, d)`` float64. labels: ``(n,)`` int64. classes: how many there are.
    """

    def __init__(self, features: Array, labels: Array, classes: int, weight: float) -> None:
        self._features, self._weight = features, weight
        self._shape = (classes, features.shape[1])
        wanted = np.eye(classes)[labels]

        def loss(flat: Array) -> tuple[float, Array]:
            theta = flat.reshape(self._shape)
            logits = features @ theta.T
            logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            slope = (np.exp(logs) - wanted).T @ features / len(features) + weight * theta
            return -float((logs * wanted).sum()) / len(features) + weight / 2 * float(flat @ flat), slope.reshape(-1)

        found = minimize(
            loss,
            np.zeros(self._shape).reshape(-1),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-9},
        )
        self.theta: Array = found.x.reshape(self._shape)
        self._probabilities = self.probabilities(features)

    def probabilities(self, features: Array) -> Array:
        """Return ``(m, classes)``."""
        logits = features @ self.theta.T
        return np.asarray(np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)))

    def residuals(self, features: Array, labels: Array) -> Array:
        """Return probabilities less one at the label, ``(m, classes)``: a record's gradient is this, outer its features."""
        found = self.probabilities(features)
        found[np.arange(len(labels)), labels] -= 1
        return found

    def hessian_product(self, direction: Array) -> Array:
        """Return the Hessian of the penalised mean loss times a direction, both ``(classes, d)``."""
        p = self._probabilities
        moved = self._features @ direction.T
        inner = p * (moved - (p * moved).sum(1, keepdims=True))
        return np.asarray(inner.T @ self._features / len(p) + self._weight * direction)

    def solve(self, gradient: Array) -> Array:
        """Return the inverse Hessian times a gradient ``(classes, d)``."""
        size = gradient.size
        product = LinearOperator((size, size), matvec=lambda flat: self.hessian_product(flat.reshape(self._shape)).reshape(-1))
        found, _ = cg(product, gradient.reshape(-1), rtol=1e-8, maxiter=2000)
        return np.asarray(found.reshape(self._shape))

    def influence(self, features: Array, labels: Array, target: Array, answers: Array) -> Array:
        """Return ``-sum over the target of grad^T H^-1 grad_i``, ``(m,)``: negative where more weight on a record lowers the target's loss.

        Without record i of the n that it was fitted to, the target's summed loss changes by about minus this over n.
        """
        solved = self.solve(self.residuals(target, answers).T @ target)
        found = np.empty(len(features))
        for start in range(0, len(features), BLOCK):
            some = slice(start, start + BLOCK)
            found[some] = -((features[some] @ solved.T) * self.residuals(features[some], labels[some])).sum(1)
        return found


class ProbeInfluence(Embedded):
    """Of each class the records that help a linear probe most at the target."""

    name: ClassVar[str] = "inf_icl"
    family: ClassVar[str] = "target"
    paper: ClassVar[str] = "In-Context Learning Demonstration Selection via Influence Analysis, 2024, arXiv 2402.11750"
    summary: ClassVar[str] = "Equal shares of classes, each the most helpful influence on the target's loss under a linear probe."
    departs: ClassVar[str] = (
        "The ranking of demonstrations chooses training records. Features are standardised. Records without a common set of labels are classed by "
        "what their responses say (k-means)."
    )
    needs_target: ClassVar[bool] = True

    vectors: Literal["sentence", "base", "gradient"] = "base"
    """A small sentence encoder's, the base's own mean hidden state, or a sketch of the record's gradient."""
    weight: Annotated[float, Field(gt=0)] = 1e-2
    """Of the probe's penalty (mu)."""
    clusters: Annotated[int, Field(gt=0)] = 8
    """Classes of responses, where records have no labels."""
    fitted: Annotated[int, Field(gt=0)] = 20_000
    """Records that the probe is fitted to; of a larger pool, some at random."""

    def choose(self, pool: Pool) -> Choice:
        labels, answers = self.classes(pool)
        features, target = self.embed(pool).astype(np.float64), measure(pool, self.signal(), pool.target).astype(np.float64)
        fitted = pool.order if len(pool) <= self.fitted else pool.generator("inf_icl").permutation(pool.order)[: self.fitted]
        mean, spread = features[fitted].mean(0), features[fitted].std(0)
        features, target = ((some - mean) / np.where(spread > 1e-9, spread, 1) for some in (features, target))
        features, target = (np.concatenate([some, np.ones((len(some), 1))], axis=1) for some in (features, target))
        classes = int(max(labels.max(), answers.max())) + 1
        probe = Probe(features[fitted], labels[fitted], classes, self.weight)
        influence = probe.influence(features, labels, target, answers)
        groups = members(labels, ranked(pool, influence, highest_first=False))
        places = round_robin(groups, fair_shares([len(group) for group in groups], self.about(pool)))
        return Choice(self.fill(pool, places), {"influence on the target's loss": influence, "class": labels.astype(np.float64)})

    def classes(self, pool: Pool) -> tuple[Array, Array]:
        """Return the class of each record and of each target record, int64."""
        records, target = list(pool.records), list(pool.target)
        if shared_labels([*records, *target]):
            return np.array([record.answer for record in records]), np.array([record.answer for record in target])
        said = SentenceEmbedding(of="response")
        labels, centres = k_means(measure(pool, said), self.clusters, pool.seed, pool.order)
        far = measure(pool, said, target)
        return labels, ((far[:, None] - centres[None]) ** 2).sum(-1).argmin(1)
