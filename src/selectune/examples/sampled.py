"""Any signal with any sampler: a line of a recipe.

Knows: which signals and samplers there are by name, and how the one feeds the other. Does not know: how signals are measured or samplers work.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from selectune.data.duplicates import near_repeats
from selectune.errors import UserError
from selectune.examples.diverse import Embedded
from selectune.examples.factors.criteria import batch_by_batch, knapsack_order, pareto_fronts
from selectune.examples.factors.determinant import draw, greedy_determinant
from selectune.examples.factors.nearest import nearest
from selectune.examples.factors.normalise import percentile_ranks, topsis
from selectune.examples.factors.signals import ResponseLoss
from selectune.examples.factors.store import measure
from selectune.examples.factors.strata import fair_shares, k_means, members, round_robin
from selectune.examples.factors.submodular import FacilityLocation, OfVectors, coverage, herding, k_centre, lazy_greedy
from selectune.examples.method import Array, Choice, ranked
from selectune.examples.pool import Pool
from selectune.examples.self_scoring import difficulty

BY_SIGNALS = ("top", "bottom", "threshold", "stratified", "pareto", "topsis", "knapsack", "online")


def repeats(pool: Pool) -> Array:
    """Return how many records of the pool a record nearly repeats or is nearly repeated by, ``(records,)`` float64, whatever the pool's order."""
    order = pool.order
    of = near_repeats([pool.records[place] for place in order])
    heads = np.where(of < 0, np.arange(len(of)), of)
    found = np.empty(len(pool))
    found[order] = np.bincount(heads, minlength=len(of))[heads] - 1
    return found


class Sampled(Embedded):
    """One signal, or several, and one sampler."""

    name: ClassVar[str] = "sampled"
    family: ClassVar[str] = "examples"
    summary: ClassVar[str] = (
        "Any signal with any sampler: top, strata, Pareto fronts, knapsack of tokens, k-centre, coverage, k-DPP, herding, ..."
    )

    sampler: Literal["top", "bottom", "threshold", "stratified", "pareto", "topsis", "knapsack", "online", "k_means", "k_centre",
                     "facility_location", "conditional_gain", "mutual_information", "k_dpp", "log_determinant", "herding"] = "top"  # fmt: skip
    """How records are taken: the first eight by their signals (of several, the mean of their ranks; Pareto and TOPSIS take them apart), the others
    by their vectors. ``conditional_gain`` covers what the target's records leave out, ``mutual_information`` what they cover."""
    signals: Annotated[tuple[Literal["loss", "difficulty", "length", "likeness", "repeats"], ...], Field(min_length=1)] = ("loss",)  # fmt: skip
    """Loss of the response, instruction-following difficulty, tokens of the response, likeness to the nearest target record, near duplicates."""
    lower: tuple[str, ...] = ("repeats",)
    """Of these signals, less is better."""
    threshold: float = 0.0
    """For ``threshold``: records at or above it (below it where less is better) may train, at random, as far as the budget goes."""
    clusters: Annotated[int, Field(gt=0)] = 32
    """Groups, for ``k_means`` and ``stratified`` (by rank of the signal)."""
    batch: Annotated[int, Field(gt=0)] = 256
    """Records that come at once, for ``online``."""

    def choose(self, pool: Pool) -> Choice:
        if self.sampler not in BY_SIGNALS:
            return Choice(self.fill(pool, self._by_vectors(pool)))
        signals: dict[str, Array] = {name: self._signal(pool, name) for name in self.signals}
        signed = {name: -found if name in self.lower else found for name, found in signals.items()}
        places = self._by_signals(pool, signed)
        unknown = ~np.isfinite(np.stack(list(signals.values()), axis=1)).all(1)
        if unknown.any():
            pool.notes.append(f"{int(unknown.sum()):,} records have no finite signal and come last")
            places = places[np.argsort(unknown[places], kind="stable")]
        return Choice(self.fill(pool, places), signals)

    def _by_signals(self, pool: Pool, signals: dict[str, Array]) -> Array:
        """The places in the order in which the budget is filled; signals are higher for better."""
        ranks = np.stack([percentile_ranks(found) for found in signals.values()], axis=1)
        score, only = ranks.mean(1), next(iter(signals.values()))
        if self.sampler == "threshold":
            if len(signals) > 1:
                raise UserError("a threshold is of one signal", field="examples.signals", expected="one name")
            limit = -self.threshold if next(iter(signals)) in self.lower else self.threshold
            mixed = ranked(pool, pool.uniform("threshold"))
            passed = mixed[only[mixed] >= limit]
            if not len(passed):
                raise UserError(f"no record passes the threshold {self.threshold:g}", field="examples.threshold",
                                expected=f"at most {np.nanmax(only):g}")  # fmt: skip
            if self.by == "records" and len(passed) < self.budget(pool):
                pool.notes.append(f"only {len(passed):,} records pass the threshold")
            return passed
        if self.sampler == "stratified":
            strata = np.minimum((score * self.clusters).astype(np.int64), self.clusters - 1)
            groups = members(strata, ranked(pool, pool.uniform("strata")))
            return round_robin(groups, fair_shares([len(group) for group in groups], self.about(pool)))
        if self.sampler == "pareto":
            return ranked(pool, -pareto_fronts(np.nan_to_num(np.stack(list(signals.values()), 1), nan=-np.inf)) + score / 2)
        if self.sampler == "topsis":
            return ranked(pool, topsis(ranks, (False,) * ranks.shape[1]))
        if self.sampler == "knapsack":
            if self.by != "tokens":
                raise UserError("a knapsack is filled by tokens", field="examples.by", expected="tokens")
            order = pool.order
            return order[knapsack_order(score[order] + 1 / len(pool), pool.tokens[order], self.budget(pool))]
        if self.sampler == "online":
            coming = ranked(pool, pool.uniform("online"))
            kept = batch_by_batch(coming, score, self.about(pool) / len(pool), self.batch)
            return np.concatenate([kept, coming[~np.isin(coming, kept)]])
        return ranked(pool, score, highest_first=self.sampler == "top")

    def _by_vectors(self, pool: Pool) -> Array:
        """The same, by vectors."""
        order, count = pool.order, self.needed(pool)
        vectors = self.embed(pool)[order]
        if self.sampler == "k_means":
            labels, centres = k_means(vectors, self.clusters, pool.seed)
            near = np.argsort(-(vectors * centres[labels]).sum(1), kind="stable")
            groups = members(labels, near)
            return order[round_robin(groups, fair_shares([len(group) for group in groups], self.about(pool)))]
        if self.sampler == "k_centre":
            return order[k_centre(vectors, count, int((vectors @ vectors.mean(0)).argmax()))]
        if self.sampler == "herding":
            return order[herding(vectors, count)]
        if self.sampler == "log_determinant":
            return order[greedy_determinant(vectors, count)[0]]
        if self.sampler == "k_dpp":
            return order[draw(vectors, count, pool.generator("k-dpp"))]
        if self.sampler == "facility_location":
            return order[coverage(vectors, count, seed=pool.seed)[0]]
        toward = (1 + self._likeness(pool)[order]) / 2
        given = {"floor": toward} if self.sampler == "conditional_gain" else {"cap": toward}
        return order[lazy_greedy(FacilityLocation(OfVectors(vectors), **given), count)[0]]

    def _likeness(self, pool: Pool) -> Array:
        if not pool.target:
            raise UserError(f"'{self.name}' is asked to look at the target, and there are no target records", field="examples",
                            expected="records of the target", mend="give --target FILE, or data.target in the recipe")  # fmt: skip
        return nearest(self.embed(pool), measure(pool, self.signal(), pool.target), 1)[1][:, 0]

    def _signal(self, pool: Pool, name: str) -> Array:
        if name == "likeness":
            return self._likeness(pool)
        if name == "repeats":
            return repeats(pool)
        if name == "length":
            return pool.tokens.astype(np.float64)
        return measure(pool, ResponseLoss()) if name == "loss" else difficulty(pool)["instruction-following difficulty"]
