"""Which whole sources help a target? Sources of a pool ranked by what they are, or by a short try.

Knows: how a source and a target are compared (divergences, means of embeddings, Fisher information, size, a few steps of training), how true
transfer is measured, and how many sources are kept. Does not know: how a divergence is computed, or how a ranking is judged.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from selectune.data.records import Record
from selectune.errors import UserError
from selectune.examples.factors import divergence
from selectune.examples.factors.signals import OwnEmbedding, SentenceEmbedding, Signal, text_of
from selectune.examples.factors.store import measure
from selectune.examples.factors.strata import k_means
from selectune.examples.method import Array, Choice, ExampleMethod, ranked
from selectune.examples.pool import Pool

Ranker = Literal[
    "mmd", "cosine", "coral", "energy", "wasserstein", "jensen_shannon", "renyi", "kullback_leibler",
    "text_embedding", "sentence_embedding", "task_embedding", "few_shot", "size",
]  # fmt: skip
CHEAP = (*divergence.OF_VECTORS, *divergence.OF_WORDS, "text_embedding", "sentence_embedding", "size")
"""Rankers that train nothing."""
Sources = dict[str, list[Record]]
NONE = "(no source)"
"""Training on the target alone: what every source must beat."""


@dataclasses.dataclass(frozen=True)
class Trying:
    """How long a try is: steps of two packed sequences each."""

    steps: int = 40
    """On the source."""
    target_steps: int = 10
    """On the target after it."""
    learning_rate: float = 1e-4
    examples: int = 32
    """Records whose gradients make a task embedding."""


def distances(
    pool: Pool,
    sources: Sources,
    target: list[Record],
    by: str,
    vectors: Literal["base", "sentence"] = "base",
    trying: Trying | None = None,
) -> dict[str, float]:
    """Return how far each source is from a target; what is low ranks first. ``few_shot`` notes those that are no better than none.

    Args:
        pool: lends its base. sources: name -> its records, or a sample of them (``size`` counts what is given).
        vectors: what divergences of vectors look at. trying: for the rankers that train.
    """
    trying = trying or Trying()
    if by == "size":
        return {name: -math.log(max(len(records), 1)) for name, records in sources.items()}
    if by == "task_embedding":
        return _by_task_embedding(pool, sources, target, trying)
    if by == "few_shot":
        found = transfer(pool, sources, target, trying)
        alone = found.pop(NONE)
        if useless := [name for name, score in found.items() if score <= alone]:
            pool.notes.append(f"no better than training on the target alone: {', '.join(useless)}")
        return {name: -score for name, score in found.items()}
    if by in divergence.OF_WORDS:
        wanted = divergence.words(text_of(record, "question") for record in target)
        found = {}
        for name, records in sources.items():
            counts = divergence.words(text_of(record, "question") for record in records)
            found[name] = divergence.OF_WORDS[by](*divergence.distributions(wanted, counts))
        return found
    if by in ("text_embedding", "sentence_embedding"):
        vectors = "base" if by == "text_embedding" else "sentence"
    signal: Signal = OwnEmbedding(of="question") if vectors == "base" else SentenceEmbedding(of="question")
    seen = [measure(pool, signal, records) for records in sources.values()]
    sets = [*seen, measure(pool, signal, target)]
    compare = divergence.OF_VECTORS.get(by, divergence.cosine)
    sets = divergence.centred(sets) if compare is divergence.cosine else sets
    return {name: compare(own, sets[-1]) for name, own in zip(sources, sets, strict=False)}


def transfer(pool: Pool, sources: Sources, target: list[Record], trying: Trying) -> dict[str, float]:
    """Return what training on each source, then on half of the target, leaves of the target's other half: the geometric mean probability of
    its response tokens. :data:`NONE` is the target alone.

    Raises:
        UserError: the target has no two records of which something trains.
    """
    from selectune.parameters.factors.trial import loss_on

    by_content = sorted((record for record in target if pool.encoder.encode(record)), key=lambda record: record.key)
    learnt, held = by_content[::2], by_content[1::2]
    if not held:
        raise UserError("transfer is trained on half of the target and scored on the other", field="target",
                        expected="at least two records of which something trains", mend="give more, or rank by another measure")  # fmt: skip
    found = {}
    for name, records in {NONE: [], **sources}.items():
        model = _continued(pool, pool.base.model, records, trying.steps, trying) if records else pool.base.model
        model = _continued(pool, model, learnt, trying.target_steps, trying)
        found[name] = math.exp(-loss_on(pool.context(held), held, model))
    return found


def _continued(pool: Pool, model: Any, records: Sequence[Record], steps: int, trying: Trying) -> Any:
    """Return a copy of a model after a short training of its blocks' matrices; the model itself where nothing can be learnt."""
    from selectune.parameters import Selection
    from selectune.parameters.factors.targets import targets
    from selectune.parameters.factors.trial import trial

    ordered = sorted(records, key=lambda record: record.key)
    if not any(pool.encoder.encode(record) for record in ordered):
        return model
    context = pool.context(ordered)
    context.base = dataclasses.replace(pool.base, model=model)
    chosen = Selection.of(model, [target.name for target in targets(pool.base)])
    return trial(context, chosen, steps=steps, learning_rate=trying.learning_rate, seed=pool.seed).model


def _by_task_embedding(pool: Pool, sources: Sources, target: list[Record], trying: Trying) -> dict[str, float]:
    """Compare the diagonals of Fisher information matrix by matrix, and put the rankings together by their reciprocal ranks."""
    wanted = fisher(pool, target, trying)
    alike = []
    for records in sources.values():
        own = fisher(pool, records, trying)
        alike.append([_cosine(own[name], wanted[name]) for name in wanted])
    fused = reciprocal_ranks(np.array(alike))
    return {name: -score for name, score in zip(sources, fused.tolist(), strict=True)}


def fisher(pool: Pool, records: list[Record], trying: Trying) -> dict[str, Any]:
    """Return the diagonal of the empirical Fisher information of each matrix of the blocks, after a short training on some records.

    A gradient is squared record by record, then the squares are averaged.
    """
    from selectune.parameters.factors.gradients import gather
    from selectune.parameters.factors.targets import targets

    context = pool.context(sorted(records, key=lambda record: record.key))
    context.base = dataclasses.replace(pool.base, model=_continued(pool, pool.base.model, records, trying.steps, trying))
    names = [target.name for target in targets(pool.base)]
    return gather(context, names, ["squared"], examples=trying.examples)["squared"]


def reciprocal_ranks(likeness: Array, offset: int = 60) -> Array:
    """Return the fused score of each candidate, ``sum over columns of 1 / (offset + rank)`` (Cormack et al. 2009); higher is better.

    Args:
        likeness: ``(candidates, columns)``. offset: how little the first ranks weigh more than the next.
    """
    ranks = (-likeness).argsort(axis=0, kind="stable").argsort(axis=0, kind="stable") + 1
    return (1 / (offset + ranks)).sum(1)


def _cosine(one: Any, other: Any) -> float:
    a, b = one.flatten().double(), other.flatten().double()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-30))


class WholeSources(ExampleMethod, ABC):
    """A method that keeps whole sources of a pool."""

    family: ClassVar[str] = "target"
    needs_target: ClassVar[bool] = True

    vectors: Literal["base", "sentence"] = "base"
    """What divergences of vectors look at: the base's own mean hidden state, or a small sentence encoder's."""
    sample: Annotated[int, Field(gt=0)] = 500
    """Records of a source (and of the target) that are looked at, the first by hash of their content."""
    clusters: Annotated[int, Field(gt=0)] = 8
    """Groups of like questions that stand for sources where all records come from one file."""
    steps: Annotated[int, Field(gt=0)] = 40
    """Of training on each source, for ``task_embedding`` and ``few_shot``."""
    ranking: Ranker
    """What sources are ranked by."""

    @abstractmethod
    def kept(self, sources: int) -> int:
        """Return how many sources are kept."""

    def choose(self, pool: Pool) -> Choice:
        groups = self.sources(pool)
        sample = len(pool) if self.ranking == "size" else self.sample
        looked = {name: [pool.records[place] for place in places[:sample].tolist()] for name, places in groups.items()}
        wanted = sorted(pool.target, key=lambda record: record.key)[: self.sample]
        far = distances(pool, looked, wanted, self.ranking, self.vectors, Trying(steps=self.steps))
        best = sorted(far, key=lambda name: (far[name], name))
        kept = best[: max(1, min(self.kept(len(best)), len(best)))]
        pool.notes.append(f"kept: {', '.join(kept)}; left: {', '.join(best[len(kept) :]) or 'none'} (by {self.ranking})")
        distance, rank = np.empty(len(pool)), np.empty(len(pool))
        for name, places in groups.items():
            distance[places], rank[places] = far[name], max(best.index(name) - len(kept) + 1, 0)
        mixed = ranked(pool, pool.uniform(self.name))
        order = mixed[np.argsort(rank[mixed], kind="stable")]
        return Choice(self.fill(pool, order), {"distance of the source": distance})

    def sources(self, pool: Pool) -> dict[str, Array]:
        """Return the places of each source's records, by hash of their content; groups of like records where there is one source alone."""
        names = [pool.records[place].source for place in pool.order.tolist()]
        if len(set(names)) > 1:
            labels: Any = np.array(names)
        else:
            signal: Signal = OwnEmbedding(of="question") if self.vectors == "base" else SentenceEmbedding(of="question")
            found, _ = k_means(measure(pool, signal), self.clusters, pool.seed, pool.order)
            labels = np.array([f"group {label}" for label in found[pool.order].tolist()])
        return {str(name): pool.order[labels == name] for name in sorted(set(labels.tolist()))}


class NearDomains(WholeSources):
    """The sources that diverge least from the target."""

    name: ClassVar[str] = "domains"
    paper: ClassVar[str] = (
        "Divergence-Based Domain Transferability for Zero-Shot Classification, EACL Findings 2023, arXiv 2302.05735"
    )
    summary: ClassVar[str] = (
        "Whole sources of the pool, those whose texts diverge least from the target's; at random within them."
    )
    departs: ClassVar[str] = (
        "The paper compares representations of domains; which measures it takes could not be checked: these are common ones, and those on counts "
        "of words are ours. A pool of one file is put into groups that stand for sources. "
        "Sources that are left come last, should the budget need them."
    )

    ranking: Ranker = "mmd"
    """The divergence."""
    keep: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the sources that is kept (rounded up)."""

    def kept(self, sources: int) -> int:
        return math.ceil(self.keep * sources)


class IntermediateTasks(WholeSources):
    """The sources that would make the best intermediate tasks."""

    name: ClassVar[str] = "intermediate"
    paper: ClassVar[str] = "What to Pre-Train on? Efficient Intermediate Task Selection, EMNLP 2021, arXiv 2104.08247"
    summary: ClassVar[str] = (
        "The few sources nearest to the target by the means of their embeddings (or another ranking of tasks)."
    )
    departs: ClassVar[str] = (
        "Means are of texts' vectors at unit length, which leave each text's first token out (it dominates a causal model's), and from three sets "
        "(two sources and the target) on are taken around the mean of the sets' means. Fisher information is squared record by record, where the "
        "paper's code squares the gradient of a batch, and is of weights alone, not of layers' outputs; a short training of the blocks stands for "
        "trained adapters, and no neighbours or linear models on frozen features rank sources. A pool of one file is put into groups that stand for "
        "sources. A source and then the target train within `few_shot` alone; what is chosen trains as the run does. A kept source that is no "
        "better than none (known by few_shot alone) is named and still kept."
    )

    ranking: Ranker = "text_embedding"
    """The ranking."""
    keep: Annotated[int, Field(gt=0)] = 3
    """How many sources."""

    def kept(self, sources: int) -> int:
        return self.keep
