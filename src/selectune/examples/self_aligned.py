"""Of several answers to a question, the one that is most familiar to the base in its own manner of answering.

Knows: the perplexity of an answer behind examples that the base answered itself (self-aligned perplexity), per record or per strategy.
Does not know: how answers are generated.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from selectune.data.records import Message, Record
from selectune.errors import UserError
from selectune.examples.among_answers import AmongAnswers, by_question, one_each
from selectune.examples.factors.normalise import percentile_ranks
from selectune.examples.factors.shown import Shot, after_shot
from selectune.examples.factors.signals import Signal, Worker
from selectune.examples.factors.store import measure
from selectune.examples.method import Array, ranked
from selectune.examples.pool import Pool
from selectune.models.anatomy import context_length


class SelfAlignedPerplexity(Signal):
    """The perplexity of a response behind an answered question, averaged over a few of them; without any, its own perplexity."""

    shown: ClassVar[str] = "self-aligned perplexity"
    shots: tuple[Shot, ...] = ()
    """Questions with the base's own answers."""
    count: int = 2
    """How many of them are used for each record: the first that are not its own question."""

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        assert worker is not None
        owners, pieces, longest = [], [], context_length(worker.base.model)
        for number, record in enumerate(records):
            others = [shot for shot in self.shots if shot[0] != record.question][: self.count]
            found = [piece for shot in others if (piece := after_shot(worker.encoder, shot, record, longest)) is not None]
            for piece in found or worker.encoder.encode(record)[:1]:
                owners.append(number)
                pieces.append(piece)
        sums, counts = np.zeros(len(records)), np.zeros(len(records))
        for owner, logs in zip(owners, worker.log_probabilities(pieces), strict=True):
            sums[owner] += math.exp(min(-float(logs.mean(dtype=np.float64)), 700.0))
            counts[owner] += 1
        return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


class SelfAligned(AmongAnswers):
    """Of several answers to a question, the one most familiar to the base; or those of the strategy that is."""

    name: ClassVar[str] = "self_aligned"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = (
        "Efficiently Selecting Response Generation Strategies for Synthetic Data Construction by Self-Aligned Perplexity, Findings of "
        "EMNLP 2025, arXiv 2502.11779"
    )
    summary: ClassVar[str] = (
        "For each question the answer of the lowest perplexity behind examples that the base answered itself."
    )
    departs: ClassVar[str] = (
        "The base's own answers are taken right or wrong, and are the same few for all records; an answer beside which none of them fits counts with "
        "its plain perplexity. The paper chooses one strategy for the whole set "
        "(per: strategy; a strategy is a file of the pool)."
    )

    per: Literal["question", "strategy"] = "question"
    """Each question's own best answer; or those from the file whose answers are most familiar on average, the next ones where it has none."""
    pairs: Annotated[int, Field(ge=0)] = 2
    """Examples behind which each answer is measured, one at a time; 0 is plain perplexity."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    """Of the base's own answers."""

    def suited(self, pool: Pool) -> tuple[Array, dict[str, Array]]:
        if self.per == "strategy" and len({record.source for record in pool.records}) < 2:
            raise UserError("a strategy is a file of the pool, and there is one file", field="examples.per", expected="question")
        perplexity = measure(pool, SelfAlignedPerplexity(shots=self.shots(pool), count=self.pairs))
        misfit = perplexity if self.per == "question" else of_strategies(pool, perplexity)
        return one_each(pool, misfit), {"self-aligned perplexity": perplexity}

    def shots(self, pool: Pool) -> tuple[Shot, ...]:
        """Return a few of the pool's questions with the base's own answers, one more than are shown at a time."""
        if not self.pairs:
            return ()
        from selectune.inference.responder import Asking, responder

        order = [
            pool.records[place] for place in ranked(pool, pool.uniform("self aligned")).tolist() if pool.records[place].prompt
        ]
        questions = list(dict.fromkeys(record.question for record in order))[: 2 * self.pairs + 2]
        said = responder(Asking(), pool).answers(
            [(Message("user", question),) for question in questions], max_new_tokens=self.max_new_tokens
        )
        answered = [(question, answers[0]) for question, answers in zip(questions, said, strict=True) if answers[0].strip()]
        return tuple(answered[: self.pairs + 1])


def of_strategies(pool: Pool, perplexity: Array) -> Array:
    """Return each record's misfit by its strategy (the file it comes from): the lower its answers' mean perplexity, the better; then by its own.

    Compared on the questions that all strategies answer, where there are any.
    """
    sources = [record.source for record in pool.records]
    names = sorted(set(sources))
    answered = by_question(pool)
    common = [places for places in answered.values() if {sources[place] for place in places} == set(names)]
    kept = [place for places in common or answered.values() for place in places if np.isfinite(perplexity[place])]
    means = {name: float(np.mean([perplexity[p] for p in kept if sources[p] == name] or [math.inf])) for name in names}
    rank = {name: place for place, name in enumerate(sorted(names, key=lambda name: (means[name], name)))}
    return np.array([rank[source] for source in sources]) + 0.5 * (1 - percentile_ranks(-perplexity))
