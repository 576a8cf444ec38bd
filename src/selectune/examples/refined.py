"""Choosing in rounds: a short training tells which groups of records are worth more of the budget.

Knows: equal shares of clusters first, then shares that follow how much a cluster's records were learnt. Does not know: how a trial is run.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from selectune.examples.diverse import Embedded
from selectune.examples.factors.signals import ResponseLoss
from selectune.examples.factors.store import measure
from selectune.examples.factors.strata import k_means, proportional_shares
from selectune.examples.method import Array, Choice, ranked
from selectune.examples.pool import Pool
from selectune.examples.trained import losses_after, trained_copy


def reweighed(weights: Array, scores: Array) -> Array:
    """Return the groups' next shares: the old ones times their scores, adding up to 1; all-zero scores leave them as they are."""
    moved = weights * scores
    return moved / moved.sum() if moved.sum() > 0 else weights


class Refined(Embedded):
    """Clusters get more of the budget the more their records are learnt."""

    name: ClassVar[str] = "k_means_refined"
    paper: ClassVar[str] = (
        "Diversify and Conquer: Diversity-Centric Data Selection with Iterative Refinement, 2024, arXiv 2409.11378"
    )
    summary: ClassVar[str] = "k-means groups sampled in rounds; between rounds a short training re-weighs the groups."
    departs: ClassVar[str] = (
        "A group's score is exp(loss before - loss after) of its chosen records, averaged, instead of a reward model's "
        "difference; a group without a chosen record has the mean score."
    )

    clusters: Annotated[int, Field(gt=0)] = 64
    """Groups (k-means)."""
    rounds: Annotated[int, Field(gt=0)] = 3
    """Parts of the budget; after each but the last a short training."""
    steps: Annotated[int, Field(gt=0)] = 30
    """Of each short training."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Of each short training."""

    def choose(self, pool: Pool) -> Choice:
        vectors, count = self.embed(pool), self.about(pool)
        labels, _ = k_means(vectors, min(self.clusters, max(1, count // 2)), pool.seed, pool.order)
        groups = sorted(set(labels.tolist()))
        weights = np.full(len(groups), 1 / len(groups))
        order = ranked(pool, pool.uniform("refined"))
        free = [[place for place in order.tolist() if labels[place] == group] for group in groups]
        chosen: list[int] = []
        for number in range(self.rounds):
            more = round(count * (number + 1) / self.rounds) - len(chosen)
            for group, share in enumerate(proportional_shares(weights.tolist(), more, [len(left) for left in free])):
                chosen += free[group][:share]
                free[group] = free[group][share:]
            if number < self.rounds - 1 and chosen:
                weights = self._weigh(pool, chosen, labels, groups, weights)
        rest = [place for place in order.tolist() if place not in set(chosen)]
        shares = np.array([weights[groups.index(label)] for label in labels.tolist()])
        return Choice(self.fill(pool, [*chosen, *rest]), {"cluster": labels.astype(np.float64), "share of its cluster": shares})

    def _weigh(self, pool: Pool, chosen: list[int], labels: Array, groups: list[int], weights: Array) -> Array:
        records = [pool.records[place] for place in chosen]
        before = measure(pool, ResponseLoss())
        after = losses_after(pool, trained_copy(pool, self.steps, self.learning_rate, records))
        drop = np.exp(before - after)
        own = [[place for place in chosen if labels[place] == group and np.isfinite(drop[place])] for group in groups]
        scores = np.array([drop[places].mean() if places else np.nan for places in own])
        return reweighed(weights, np.where(np.isfinite(scores), scores, np.nanmean(scores) if np.isfinite(scores).any() else 1.0))
