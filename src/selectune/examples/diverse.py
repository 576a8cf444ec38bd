"""Spread over the pool: clusters, centres, determinants, coverage.

Knows: how records are chosen so that each region of the pool is there. Does not know: the target, or how good a record is unless a signal says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from selectune.examples.factors.determinant import greedy_determinant, log_determinant_distance
from selectune.examples.factors.signals import GradientSketch, OwnEmbedding, SentenceEmbedding, Signal
from selectune.examples.factors.store import measure
from selectune.examples.factors.strata import fair_shares, k_means, members, proportional_shares, round_robin
from selectune.examples.factors.submodular import coverage, k_centre
from selectune.examples.method import Array, Choice, ExampleMethod, ranked
from selectune.examples.pool import Pool
from selectune.examples.self_scoring import difficulty


class Embedded(ExampleMethod, ABC):
    """A method that looks at records as vectors."""

    family: ClassVar[str] = "diversity"

    vectors: Literal["sentence", "base", "gradient"] = "sentence"
    """A small sentence encoder's, the base's own mean hidden state, or a sketch of the record's gradient."""
    of: Literal["question", "response", "both"] = "question"
    """Which text is embedded."""

    def embed(self, pool: Pool) -> Array:
        """Return unit vectors, ``(records, dimensions)`` fp32."""
        return measure(pool, self.signal())

    def signal(self) -> Signal:
        """Return the signal that the vectors are."""
        if self.vectors == "gradient":
            return GradientSketch()
        return OwnEmbedding(of=self.of) if self.vectors == "base" else SentenceEmbedding(of=self.of)


class Clustered(Embedded, ABC):
    """Groups of like records, and a rule within each."""

    clusters: Annotated[int, Field(gt=0)] = 32
    """Groups (k-means)."""

    @abstractmethod
    def order(self, pool: Pool, vectors: Array, labels: Array, centres: Array) -> tuple[Array, dict[str, Array]]:
        """Return places, best first (within each group their order counts), and signals; those left out come last, after all groups."""

    def shares(self, sizes: list[int], budget: int) -> list[int]:
        """Return each group's share: equal ones, what small groups cannot use going to the larger."""
        return fair_shares(sizes, budget)

    def choose(self, pool: Pool) -> Choice:
        vectors = self.embed(pool)
        labels, centres = k_means(vectors, self.clusters, pool.seed, pool.order)
        order, signals = self.order(pool, vectors, labels, centres)
        groups = members(labels, order)
        places = round_robin(groups, self.shares([len(group) for group in groups], self.about(pool)))
        if len(order) < len(pool):
            pool.notes.append(f"{len(pool) - len(order):,} records have nothing to learn and come last")
            places = np.concatenate([places, pool.order[~np.isin(pool.order, order)]])
        return Choice(self.fill(pool, places), {"cluster": labels.astype(np.float64)} | signals)


class EasyAndHard(Clustered):
    """Of each group the records nearest to its centre and those farthest from it."""

    name: ClassVar[str] = "deft"
    paper: ClassVar[str] = "DEFT: Data Efficient Fine-Tuning via Unsupervised Core-Set Selection, 2023, arXiv 2310.16776"
    summary: ClassVar[str] = "A random base set, and from k-means groups the most typical and the most unusual records."
    departs: ClassVar[str] = (
        "The random base set is not stratified by task, which a pool need not know; groups are of the whole pool, and pass over the base set."
    )

    clusters: Annotated[int, Field(gt=0)] = 16
    """Groups (the paper: one for each of its seven tasks)."""
    easy: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of typical records; the rest is unusual."""
    random: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the budget that is random."""

    def order(self, pool: Pool, vectors: Array, labels: Array, centres: Array) -> tuple[Array, dict[str, Array]]:
        directions = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
        distance = np.where(vectors.any(1), 1 - (vectors * directions[labels]).sum(1), np.nan)  # no gradient: nothing to learn
        near = ranked(pool, distance, highest_first=False)[: int(np.isfinite(distance).sum())]
        rank = np.full(len(pool), np.nan)
        for group in members(labels, near):
            typical, unusual = iter(group), iter(group[::-1])
            seen: set[int] = set()
            quota = 0.0
            for turn in range(len(group)):
                quota += self.easy
                source = typical if quota >= 1 - 1e-9 else unusual
                quota -= quota >= 1 - 1e-9
                place = next(place for place in source if place not in seen)
                seen.add(place)
                rank[place] = turn
        return ranked(pool, rank, highest_first=False)[: len(near)], {"distance to centre": distance}

    def choose(self, pool: Pool) -> Choice:
        choice = super().choose(pool)
        if not self.random:
            return choice
        base = ranked(pool, pool.uniform("deft base"))[: round(self.random * self.about(pool))]
        kept = set(base.tolist())
        rest = [place for place in choice.places.tolist() if place not in kept]
        more = [place for place in ranked(pool, pool.uniform("deft rest")).tolist() if place not in kept]
        choice.places = self.fill(pool, list(dict.fromkeys([*base.tolist(), *rest, *more])))
        return choice


class ClusteredDifficulty(Clustered):
    """The same top share of every group, by IFD."""

    name: ClassVar[str] = "clustered_ifd"
    paper: ClassVar[str] = "Data-efficient LLM Fine-tuning for Code Generation, 2025, arXiv 2504.12687"
    summary: ClassVar[str] = "The same share of every k-means group, its hardest by instruction-following difficulty."
    departs: ClassVar[str] = (
        "all-MiniLM-L6-v2 instead of all-mpnet-base-v2. The paper's packing by length is every run's packing here. Records that the question does "
        "not help with (1 and more) come last in their group and are not dropped."
    )

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of each group."""

    def order(self, pool: Pool, vectors: Array, labels: Array, centres: Array) -> tuple[Array, dict[str, Array]]:
        signals = difficulty(pool)
        ratio = signals["instruction-following difficulty"]
        return ranked(pool, np.where(ratio < 1, ratio, -ratio))[: int(np.isfinite(ratio).sum())], signals

    def shares(self, sizes: list[int], budget: int) -> list[int]:
        return proportional_shares(sizes, budget, sizes)


class ClusteredRandom(Clustered):
    """The same number from every group, at random."""

    name: ClassVar[str] = "k_means_random"
    paper: ClassVar[str] = (
        "Diversify and Conquer: Diversity-Centric Data Selection with Iterative Refinement, 2024, arXiv 2409.11378 (its static baseline)"
    )
    summary: ClassVar[str] = "Equal numbers from every k-means group, at random within it."

    clusters: Annotated[int, Field(gt=0)] = 64
    """Groups (k-means)."""

    def order(self, pool: Pool, vectors: Array, labels: Array, centres: Array) -> tuple[Array, dict[str, Array]]:
        return ranked(pool, pool.uniform("k-means random")), {}


class Determinant(Embedded):
    """A likely set of a determinantal point process."""

    name: ClassVar[str] = "determinant"
    paper: ClassVar[str] = "Diversity Measurement and Subset Selection for Instruction Tuning Datasets, 2024, arXiv 2402.02318"
    summary: ClassVar[str] = (
        "Greedily the records whose vectors span the largest volume (k-DPP), weighed by difficulty if asked for."
    )
    departs: ClassVar[str] = (
        "Sketches of adapter gradients with 1,024 dimensions; quality is instruction-following difficulty (0 where the question does not help, or "
        "nothing is learnt), and weighs the ridge too."
    )

    vectors: Literal["sentence", "base", "gradient"] = "gradient"
    """A small sentence encoder's, the base's own mean hidden state, or a sketch of the record's gradient."""
    quality: Annotated[float, Field(ge=0)] = 0.0
    """How much quality counts against diversity (lambda)."""
    tau: Annotated[float, Field(gt=0)] = 1e-3
    """Ridge of the kernel."""

    def choose(self, pool: Pool) -> Choice:
        vectors, order, signals = self.embed(pool), pool.order, {}
        weight = None
        if self.quality:
            signals = difficulty(pool)
            ratio = signals["instruction-following difficulty"]
            weight = np.exp(self.quality * np.nan_to_num(np.where(ratio < 1, ratio, 0.0)) / 2)[order]
        count = self.needed(pool)
        places, gains = greedy_determinant(vectors[order], count, weight, self.tau)
        spread = np.full(len(pool), np.nan)
        spread[order[places]] = gains
        chosen = self.fill(pool, order[places])
        if len(chosen):
            apart = log_determinant_distance(vectors[order], vectors[chosen], pool.generator("distance"), tau=self.tau)
            pool.notes.append(f"as many records at random are {apart:.2f} nats a record less diverse (log-determinant distance)")
        return Choice(chosen, {"added log-determinant": spread} | signals)


class Centres(Embedded):
    """Each next record the farthest from all before it."""

    name: ClassVar[str] = "k_centre"
    paper: ClassVar[str] = (
        "Active Learning for Convolutional Neural Networks: A Core-Set Approach, ICLR 2018, arXiv 1708.00489; DiverseEvol, 2023, arXiv 2311.08182"
    )
    summary: ClassVar[str] = "Greedy k-centre: each next record the farthest from all before it."
    departs: ClassVar[str] = "Once, on the base's or an encoder's vectors; DiverseEvol repeats it on the model as it is tuned."

    def choose(self, pool: Pool) -> Choice:
        order = pool.order
        vectors = self.embed(pool)[order]
        mean = vectors.mean(0)
        first = int((vectors @ mean).argmax())
        count = self.needed(pool)
        return Choice(self.fill(pool, order[k_centre(vectors, count, first)]))


class Coverage(Embedded):
    """Every record should have a chosen one that is like it."""

    name: ClassVar[str] = "facility_location"
    paper: ClassVar[str] = (
        "Submodular facility location, maximised by lazy greedy (Minoux 1978); as in DELIFT, ICLR 2025, arXiv 2411.04425, with embeddings"
    )
    summary: ClassVar[str] = "Greedy facility location over embeddings: the chosen records cover the pool."
    departs: ClassVar[str] = "Pools of more than 100,000 records are covered in blocks, each with its share."

    block: Annotated[int, Field(gt=0)] = 100_000
    """Records that are covered together, exactly; larger pools are put into blocks at random."""

    def choose(self, pool: Pool) -> Choice:
        order = pool.order
        vectors = self.embed(pool)[order]
        count = self.needed(pool)
        places, gains = coverage(vectors, count, self.block, pool.seed)
        covered = np.full(len(pool), np.nan)
        covered[order[places]] = gains
        return Choice(self.fill(pool, order[places]), {"added coverage": covered})
