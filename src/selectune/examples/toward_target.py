"""Toward a target: records that make its distribution, its prompts or its tasks better served.

Knows: the gradient of optimal transport (GOT-D), the uncertainty that is left at a prompt (SIFT), balanced influence on several tasks (BIDS), and
the plain nearest records that all of them should beat. Does not know: how records are measured.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from selectune.examples.diverse import Embedded
from selectune.examples.factors.nearest import nearest
from selectune.examples.factors.normalise import unit
from selectune.examples.factors.signals import GradientSketch
from selectune.examples.factors.store import measure
from selectune.examples.factors.strata import k_means
from selectune.examples.factors.transport import calibrated_gradient, potentials
from selectune.examples.method import Array, Choice, ExampleMethod, ranked
from selectune.examples.pool import Pool

ROUNDING = 1e-6
"""Vectors that are no longer than this are the rounding of zero."""


class Nearest(Embedded):
    """The records most like one of the target's."""

    name: ClassVar[str] = "nearest"
    family: ClassVar[str] = "target"
    summary: ClassVar[str] = "Control: the records whose vectors lie nearest to one of the target's."
    needs_target: ClassVar[bool] = True

    def choose(self, pool: Pool) -> Choice:
        likeness = nearest(self.embed(pool), measure(pool, self.signal(), pool.target), 1)[1][:, 0]
        return Choice(self.fill(pool, ranked(pool, likeness)), {"likeness": likeness})


class TransportGradient(Embedded):
    """The records whose weight in the pool, if it grew, would bring the pool nearest to the target."""

    name: ClassVar[str] = "got_d"
    family: ClassVar[str] = "target"
    paper: ClassVar[str] = (
        "Get more for less: Principled Data Selection for Warming Up Fine-Tuning in LLMs, ICLR 2024, arXiv 2405.02774"
    )
    summary: ClassVar[str] = "The most negative gradient of optimal transport from the pool to the target."
    departs: ClassVar[str] = (
        "The pool itself stands for the pretraining data; large pools are taken in blocks of 5,000 against the whole target. What is chosen trains "
        "once, as the run trains; the paper warms the model up on it and then tunes it on the target."
    )
    needs_target: ClassVar[bool] = True

    regularisation: Annotated[float, Field(gt=0)] = 0.05
    """Entropy's weight, as a share of the largest cost."""
    block: Annotated[int, Field(gt=0)] = 5000
    """Records that are transported together."""

    def choose(self, pool: Pool) -> Choice:
        vectors, wanted = self.embed(pool), measure(pool, self.signal(), pool.target)
        gradient = np.empty(len(pool))
        mixed = pool.order[pool.generator("got_d").permutation(len(pool))]
        parts, rough = -(-len(pool) // self.block), 0
        for some in np.array_split(mixed, parts):
            costs = np.sqrt(np.maximum(2 - 2 * vectors[some].astype(np.float64) @ wanted.T.astype(np.float64), 0))
            largest = max(costs.max(), 1e-12)
            source, _, exact = potentials(costs / largest, self.regularisation)
            gradient[some] = largest * calibrated_gradient(source)
            rough += not exact
        if rough:
            pool.notes.append(
                f"transport of {rough} of {parts} blocks did not settle: its gradient is rough (raise `regularisation`)"
            )
        return Choice(self.fill(pool, ranked(pool, gradient, highest_first=False)), {"transport gradient": gradient})


def least_uncertain(
    vectors: Array,
    targets: Array,
    count: int,
    noise: float,
    repeat: bool = False,
    sizes: Array | None = None,
    enough: float = np.inf,
) -> tuple[Array, Array]:
    """Return places in the order in which they most lower the posterior variance at the targets, and the variance left, summed over them.

    A Gaussian process with the linear kernel, kept in the vectors' own dimension: after observing ``x`` with noise,
    ``Sigma <- Sigma - Sigma x x^T Sigma / (x^T Sigma x + noise)``.

    Args:
        vectors: ``(n, d)``. targets: ``(m, d)``. noise: of an observation (lambda). repeat: a record may be taken again. sizes: ``(n,)``; what
            was taken is enough when its sizes add up to so much.
    """
    vectors, targets = vectors.astype(np.float64), targets.astype(np.float64)
    covariance = np.eye(vectors.shape[1])
    cross, own = vectors @ targets.T, (vectors**2).sum(1)  # covariance with the targets, variance of each
    left = float((targets**2).sum())
    taken = np.zeros(len(vectors), dtype=bool)
    places, variances, sum_of_sizes = [], [], 0.0
    for _ in range(count if repeat else min(count, len(vectors))):
        if sum_of_sizes >= enough:
            break
        gains = np.einsum("ij,ij->i", cross, cross) / (own + noise)
        place = int(np.where(taken & (not repeat), -np.inf, gains).argmax())
        places.append(place)
        taken[place] = True
        sum_of_sizes += 0.0 if sizes is None else float(sizes[place])
        left -= gains[place]
        variances.append(max(left, 0.0))
        moved = covariance @ vectors[place]
        scale = own[place] + noise
        along = vectors @ moved
        cross -= np.outer(along, targets @ moved / scale)
        own = np.maximum(own - along**2 / scale, 0)
        covariance -= np.outer(moved, moved) / scale
    return np.array(places, dtype=np.int64), np.array(variances)


def around_their_mean(vectors: Array, wanted: Array, order: Array) -> tuple[Array, Array]:
    """Return some vectors and others less the mean of the first, at unit length; what lies at the mean is zero, and all stay where all the first do.

    Args:
        vectors: ``(n, d)``, unit length. wanted: ``(m, d)``, unit length. order: the places whose mean it is.
    """
    mean = vectors[order].mean(0, dtype=np.float64).astype(vectors.dtype)
    own, others = (
        np.where(np.linalg.norm(moved, axis=1, keepdims=True) > ROUNDING, moved, 0) for moved in (vectors - mean, wanted - mean)
    )
    return (unit(own), unit(others)) if own[order].any() else (vectors, wanted)


class LeastUncertain(Embedded):
    """The records that leave least uncertainty at the target's prompts."""

    name: ClassVar[str] = "sift"
    family: ClassVar[str] = "target"
    paper: ClassVar[str] = "Efficiently Learning at Test-Time: Active Fine-Tuning of LLMs, ICLR 2025, arXiv 2410.08020"
    summary: ClassVar[str] = (
        "Greedily the records that most shrink the posterior variance at the target's prompts; repetitions count for little."
    )
    departs: ClassVar[str] = (
        "Vectors are centred (those of small models all lie near each other); records that point away from every prompt come last, where the "
        "paper squares and so welcomes them; one choice for all prompts, from the 20,000 records nearest to any instead of each prompt's 200, and as "
        "large as the budget: the rule by which a prompt's steps stop is that of answering one question; no record twice."
    )
    needs_target: ClassVar[bool] = True

    noise: Annotated[float, Field(gt=0)] = 0.01
    """Of an observation (lambda)."""
    centre: bool = True
    """Subtract the pool's mean from all vectors."""
    candidates: Annotated[int, Field(gt=0)] = 20_000
    """Records among which it chooses, those most like a prompt; the others come after them, the most like first."""

    def choose(self, pool: Pool) -> Choice:
        vectors, wanted = self.embed(pool), measure(pool, self.signal(), pool.target)
        order = pool.order
        if self.centre:
            vectors, wanted = around_their_mean(vectors, wanted, order)
        likeness = (vectors[order] @ wanted.T).max(1)
        by_likeness = np.argsort(-likeness, kind="stable")
        pointing = int((likeness > 0).sum())
        near = order[np.sort(by_likeness[: min(pointing, self.candidates)])]
        # by tokens: twice the budget leaves out nothing that could still fill its last gap
        limit = {"sizes": pool.tokens[near], "enough": 2 * self.budget(pool)} if self.by == "tokens" else {}
        places, left = least_uncertain(vectors[near], wanted, self.needed(pool), self.noise, **limit)
        variance = np.full(len(pool), np.nan)
        variance[near[places]] = left / len(wanted)
        rest = order[by_likeness]
        rest = rest[np.isin(rest, near[places], invert=True)]
        if pointing < self.about(pool):
            pool.notes.append(f"only {pointing:,} records point toward a record of the target: the rest of the choice does not")
        return Choice(self.fill(pool, [*near[places], *rest]), {"variance left": variance})


def balanced(influence: Array, count: int) -> Array:
    """Return places, each next one the best for the column that the ones before it serve least (BIDS).

    Args:
        influence: ``(records, columns)``; each column is standardised first.
    """
    spread = influence.std(0)
    scores = (influence - influence.mean(0)) / np.where(spread > 0, spread, 1)
    taken, total, places = np.zeros(len(scores), dtype=bool), np.zeros(scores.shape[1]), []
    for size in range(min(count, len(scores))):
        mean = total / size if size else total
        place = int(np.where(taken, -np.inf, (scores - mean).max(1)).argmax())
        places.append(place)
        taken[place] = True
        total += scores[place]
    return np.array(places, dtype=np.int64)


class Balanced(ExampleMethod):
    """Records by their influence on groups of target records, each next one for the group that is served least."""

    name: ClassVar[str] = "bids"
    family: ClassVar[str] = "target"
    paper: ClassVar[str] = (
        "Improving Influence-based Instruction Tuning Data Selection for Balanced Learning of Diverse Capabilities, 2025, arXiv 2501.12147"
    )
    summary: ClassVar[str] = (
        "Greedily for the least served of several tasks, by influence (gradient sketches); general ability can be one of them."
    )
    departs: ClassVar[str] = (
        "Influence is the cosine of gradient sketches at the base, without warm-up checkpoints or Adam's preconditioning; columns are means over "
        "small groups of target records."
    )
    needs_target: ClassVar[bool] = True

    groups: Annotated[int, Field(gt=0)] = 8
    """Columns: target records are put into so many groups (k-means of their sketches)."""
    protect: Annotated[int, Field(ge=0)] = 0
    """More columns, of the built-in general conversations: what should not be lost."""
    dimension: Annotated[int, Field(gt=0)] = 1024
    """Of the sketches."""

    def choose(self, pool: Pool) -> Choice:
        signal = GradientSketch(dimension=self.dimension)
        sketches = measure(pool, signal)
        columns: list[Array] = []
        for listed, groups in ((pool.target, self.groups), (pool.context().general, self.protect)):
            if groups:
                records = sorted(listed, key=lambda record: record.key)
                told = measure(pool, signal, records)
                labels, _ = k_means(told, groups, pool.seed)
                columns += [told[labels == group].mean(0) for group in sorted(set(labels.tolist()))]
        influence = sketches.astype(np.float64) @ np.stack(columns).T
        order = pool.order
        count = self.needed(pool)
        return Choice(self.fill(pool, order[balanced(influence[order], count)]), {"mean influence": influence.mean(1)})
