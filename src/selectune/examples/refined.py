"""Choosing in rounds: a short training tells which groups of records are worth more of the budget.

Knows: equal shares of clusters first, then shares that follow how much a cluster's records were learnt. Does not know: how a trial is run.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from selectune.examples.diverse import Embedded
from selectune.examples.factors.learnt import Learnt
from selectune.examples.factors.signals import ResponseLoss
from selectune.examples.factors.store import measure
from selectune.examples.factors.strata import k_means, proportional_shares
from selectune.examples.method import Array, Choice, ranked
from selectune.examples.pool import Pool


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
        "A group's score is exp(loss before - loss after) of the records that it gave in the round, averaged, instead of a reward model's "
        "difference; a group that gave none has the mean score. Groups give their shares exactly instead of being drawn by them, and there are at "
        "most half as many as records are chosen."
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
            more, known = round(count * (number + 1) / self.rounds) - len(chosen), len(chosen)
            for group, share in enumerate(proportional_shares(weights.tolist(), more, [len(left) for left in free])):
                chosen += free[group][:share]
                free[group] = free[group][share:]
            if number < self.rounds - 1 and chosen:
                weights = self._weigh(pool, chosen, chosen[known:], labels, groups, weights)
        rest = order[np.isin(order, chosen, invert=True)]
        shares = weights[np.searchsorted(groups, labels)]
        return Choice(self.fill(pool, [*chosen, *rest]), {"cluster": labels.astype(np.float64), "share of its cluster": shares})

    def _weigh(self, pool: Pool, chosen: list[int], new: list[int], labels: Array, groups: list[int], weights: Array) -> Array:
        """Return the groups' next shares: the base learns what is chosen, and what is new of it tells how well."""
        learnt, told = ([pool.records[place] for place in places] for places in (chosen, new))
        after = Learnt(pool, self.steps, self.learning_rate, learnt).losses(pool.of(told))
        drop = np.exp(measure(pool, ResponseLoss(), told) - after)
        own = [drop[(labels[new] == group) & np.isfinite(drop)] for group in groups]
        scores = np.array([some.mean() if len(some) else np.nan for some in own])
        return reweighed(weights, np.where(np.isfinite(scores), scores, np.nanmean(scores) if np.isfinite(scores).any() else 1.0))
