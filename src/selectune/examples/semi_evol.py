"""Few answered records, many questions: answers that a model gives again and again are learnt from.

Knows: how a model that has learnt the target's records answers the pool's questions several times, beside like ones; when answers agree; how
disagreement is settled; and which answers are trusted. Does not know: how a model is trained for a short while, or who answers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from selectune.data.records import Message, Record
from selectune.examples.diverse import Embedded
from selectune.examples.factors.asking import FORMAT, alike, answered, final, put, question, questions_only, solved
from selectune.examples.factors.learnt import Learnt
from selectune.examples.factors.nearest import nearest
from selectune.examples.factors.store import measure
from selectune.examples.method import Array, Choice
from selectune.examples.pool import Pool
from selectune.inference.local import LocalResponder
from selectune.inference.responder import Asking, Responder, kept_in, responder

BESIDE = (
    "These questions are answered well:\n\n{examples}\n\nAnswer this one in the same way.\n" + FORMAT + "\n\nQuestion: {question}"
)
SETTLED = (
    "A question was answered several times, and the answers differ. Find what is wrong with each, then give the right answer.\n"
    + FORMAT
    + "\n\nQuestion: {question}\n\nAnswers:\n{answers}"
)


class SemiSupervised(Asking, Embedded):
    """The pool's questions with the answers of a model that has learnt the target's records, surest first."""

    name: ClassVar[str] = "semi_evol"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = (
        "Semi-supervised Fine-tuning for Large Language Models (SemiEvol), NAACL Findings 2025, arXiv 2410.14745"
    )
    summary: ClassVar[str] = (
        "Answers of a base that has learnt the target's records, drawn several times: those that agree are kept, others are settled, and kept where "
        "they are likely."
    )
    departs: ClassVar[str] = (
        "The answered records are the target's; they are learnt before, and training starts from the base on what is chosen. All draws are made "
        "beside neighbours. How likely a settled answer is, is asked of the copy that learnt, of the bare answer after the bare question. A budget "
        "ends the order agreed, settled and likely, the rest; a question without a usable answer keeps its own and comes last. "
        "Choices are answered in words: their log-likelihoods over permutations of their order are not used."
    )
    changes: ClassVar[bool] = True
    needs_target: ClassVar[bool] = True

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the pool that trains."""
    samples: Annotated[int, Field(gt=1)] = 4
    """Answers to each question."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of the answers."""
    neighbours: Annotated[int, Field(ge=0)] = 3
    """Answered records beside which a question is asked."""
    likely: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the settled answers that is kept."""
    steps: Annotated[int, Field(ge=0)] = 60
    """Of the training on the target's records."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Of that training."""
    longest: Annotated[int, Field(gt=0)] = 128
    """Tokens of an answer."""

    def choose(self, pool: Pool) -> Choice:
        questions_only([*pool.records, *pool.target], self.name)
        learnt = Learnt(pool, self.steps, self.learning_rate, sorted(pool.target, key=lambda record: record.key))
        made = self._responder(pool, learnt)
        agreed: set[int] = set()
        labels: dict[int, str] = {}
        drawn = self._draw(made, pool)
        for place, own in drawn.items():
            labels[place] = own[0]
            if alike(pool.records[place], own) == [list(range(len(own)))]:
                agreed.add(place)
        split = [place for place in pool.order.tolist() if place not in agreed]
        labels |= self._settle(made, pool, {place: drawn[place] for place in split})
        anew = {place: record for place, text in labels.items() if (record := answered(pool.records[place], text)) is not None}
        records = [anew.get(place, record) for place, record in enumerate(pool.records)]
        changed = pool.of(records)
        doubt = learnt.losses(changed)
        doubt[[place for place in range(len(pool)) if place not in anew]] = np.inf
        doubt = np.where(np.isnan(doubt), np.inf, doubt)
        order, trusted = self._in_order(pool, doubt, agreed, set(split))
        first = {changed.keys[place]: place for place in reversed(order)}
        if again := {place for place in anew if first[changed.keys[place]] != place}:
            pool.notes.append(f"{len(again):,} questions repeat another with its answer and come last")
            order = sorted(order, key=lambda place: place in again)
        pool.notes.append(
            f"{len(agreed):,} of {len(pool):,} questions are answered alike, {len(trusted):,} more are settled and likely"
        )
        reasons = dict.fromkeys(agreed, "all answers agree") | dict.fromkeys(trusted, "settled, and likely")
        signals = {"agreed": np.array([float(place in agreed) for place in range(len(pool))]), "doubt": doubt}
        return Choice(self.fill(pool, order, changed), signals, reasons, records=records)

    def _in_order(self, pool: Pool, doubt: Array, agreed: set[int], split: set[int]) -> tuple[list[int], list[int]]:
        """Return all places, the most trusted first, and the settled ones that are trusted."""
        by_doubt = sorted(pool.order.tolist(), key=lambda place: doubt[place])
        settled = [place for place in by_doubt if place in split and np.isfinite(doubt[place])]
        trusted = settled[: round(self.likely * len(settled))]
        first = [place for place in by_doubt if place in agreed] + trusted
        kept = set(first)
        return [*first, *(place for place in by_doubt if place not in kept)], trusted

    # -- who answers -------------------------------------------------------------------------------------------------------

    def _responder(self, pool: Pool, learnt: Learnt) -> Responder:
        if self.by_endpoint is not None or self.by_model is not None:
            return responder(self, pool)
        base = replace(pool.base, model=learnt.model)
        return LocalResponder(base, pool.encoder, pool.meter, kept_in(pool), pool.quiet, pool.rehearsal, trained=learnt.name)

    # -- what is asked -----------------------------------------------------------------------------------------------------

    def _draw(self, made: Responder, pool: Pool) -> dict[int, list[str]]:
        """Return the answers that are drawn for each record, by place."""
        answered_well = sorted(pool.target, key=lambda record: record.key)
        near, _ = nearest(self.embed(pool), measure(pool, self.signal(), answered_well), self.neighbours)
        prompts = [
            self._beside(record, [answered_well[place] for place in own])
            for record, own in zip(pool.records, near.tolist(), strict=True)
        ]
        said = made.answers(
            prompts, samples=self.samples, temperature=self.temperature, max_new_tokens=self.longest, seed=pool.seed
        )
        return {place: [final(text) for text in own] for place, own in enumerate(said)}

    def _beside(self, record: Record, examples: list[Record]) -> tuple[Message, ...]:
        form = BESIDE if examples else FORMAT + "\n\nQuestion: {question}"
        return put(record, form.format(question=question(record), examples="\n\n".join(map(solved, examples))))

    def _settle(self, made: Responder, pool: Pool, drawn: dict[int, list[str]]) -> dict[int, str]:
        """Return one answer for each record whose answers differ."""
        prompts = []
        for place, own in drawn.items():
            listed = "\n".join(f"{number + 1}. {text}" for number, text in enumerate(own))
            prompts.append(put(pool.records[place], SETTLED.format(question=question(pool.records[place]), answers=listed)))
        said = made.answers(prompts, temperature=self.temperature, max_new_tokens=self.longest, seed=pool.seed)
        return {place: final(text) for place, (text,) in zip(drawn, said, strict=True)}
