"""Records whose answers may be wrong: the model says which, answers them anew, and is believed where it is sure.

Knows: what is asked of a record, how likely an answer is as it was asked for, in what order clean, relabelled and doubtful records come.
Does not know: who answers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from selectune.data.chat import Encoded
from selectune.data.records import Message, Record
from selectune.evaluation.target import extract_answer
from selectune.examples.diverse import Embedded
from selectune.examples.factors.asking import FORMAT, answered, final, put, question, questions_only, same, solved
from selectune.examples.factors.likely_labels import OfLabels
from selectune.examples.factors.nearest import nearest
from selectune.examples.factors.signals import ResponseLoss, Worker
from selectune.examples.factors.store import measure
from selectune.examples.method import Array, Choice
from selectune.examples.pool import Pool
from selectune.inference.local import LocalResponder
from selectune.inference.responder import Asking, Responder, responder
from selectune.models.anatomy import context_length

DIRECT = "Answer directly.\n" + FORMAT + "\n\nQuestion: {question}"
REASONED = "Think it through step by step, check your steps, then answer.\n" + FORMAT + "\n\nQuestion: {question}"
BESIDE = (
    "These questions are answered well:\n\n{examples}\n\nAnswer this one in the same way.\n" + FORMAT + "\n\nQuestion: {question}"
)
REVIEW = (
    "Two attempts at a question are given. Judge both and give the final answer.\n" + FORMAT + "\n\nQuestion: {question}\n\n"
    "First attempt: {reasoned}\n\nSecond attempt, made beside answered questions: {beside}"
)


class LossAsAsked(ResponseLoss):
    """Mean negative log-likelihood of a conversation's last answer, nats per token, after as much of its prompt as an answering model reads."""

    shown: ClassVar[str] = "loss of answers as asked"

    def _pieces(self, worker: Worker, records: list[Record]) -> tuple[list[int], list[Encoded]]:
        context = context_length(worker.base.model)
        owners, pieces = [], []
        for number, record in enumerate(records):
            said = worker.encoder.response_ids(record.response)[: context // 2]
            asked = worker.encoder.prompt_ids(record.prompt)[-(context - len(said)) :]
            if said:
                owners.append(number)
                pieces.append(Encoded(asked + said, [-100] * len(asked) + said))
        return owners, pieces


class RobustFineTuning(Asking, Embedded):
    """Records whose answer the model would give too; then those that it answers anew and is sure of."""

    name: ClassVar[str] = "robust_ft"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = (
        "RobustFT: Robust Supervised Fine-tuning for Large Language Models under Noisy Response, 2024, arXiv 2412.14922"
    )
    summary: ClassVar[str] = (
        "Records whose answer a model agrees with, directly and with reasoning; others are answered anew beside clean neighbours and kept where "
        "the answer is likely."
    )
    departs: ClassVar[str] = (
        "A budget ends the order clean, relabelled (surest first), doubtful as they were; the paper drops the doubtful. Where the run's base "
        "answers for itself, the doubtful come before the relabelled: what it does not know is not taken for noise. Answers agree when the words "
        "of one are among the other's, final answers where they are marked; where a model on this machine answers, a record's own choice must be "
        "the likeliest instead. The review is shown final answers and no reasoning. The run's base judges how likely an answer is, also where an "
        "endpoint or another model gave it."
    )
    changes: ClassVar[bool] = True

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Share of the pool that trains."""
    sure: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the records answered anew that counts as sure (beta)."""
    neighbours: Annotated[int, Field(ge=0)] = 3
    """Clean records beside which a question is answered anew."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of all answers."""
    longest: Annotated[int, Field(gt=0)] = 256
    """Tokens of an answer (the paper: 512)."""

    def choose(self, pool: Pool) -> Choice:
        questions_only(pool.records, self.name)
        made = responder(self, pool)
        everyone, likeliest = pool.order.tolist(), self._likeliest(made, pool)
        written = [place for place in everyone if place not in likeliest]
        direct, reasoned = (_finals(self._ask(made, pool, form, written)) for form in (DIRECT, REASONED))
        agreed = {place for place, own in likeliest.items() if own} | {
            place for place in written
            if all(same(pool.records[place], said[place], _wanted(pool.records[place])) for said in (direct, reasoned))
        }  # fmt: skip
        clean, noisy = ([place for place in everyone if (place in agreed) == wanted] for wanted in (True, False))
        reasoned |= _finals(self._ask(made, pool, REASONED, [place for place in noisy if place in likeliest]))
        examples = self._examples(pool, clean, noisy)
        beside = self._ask(made, pool, BESIDE if clean else DIRECT, noisy, examples=examples)
        last = _finals(self._ask(made, pool, REVIEW, noisy, reasoned=reasoned, beside=_finals(beside)))
        anew = {place: record for place in noisy if (record := answered(pool.records[place], last[place])) is not None}
        doubt = self._doubt(pool, beside)
        sure = [
            place for place in sorted(noisy, key=lambda place: doubt[place])[: round(self.sure * len(noisy))] if place in anew
        ]
        records = list(pool.records)
        for place in sure:
            records[place] = anew[place]
        trusted = set(sure)
        drawn = pool.uniform(self.name)
        rest = sorted((place for place in noisy if place not in trusted), key=lambda place: doubt[place])
        itself = self.by_endpoint is None and self.by_model is None
        order = [*sorted(clean, key=lambda place: drawn[place]), *(rest + sure if itself else sure + rest)]
        pool.notes.append(
            f"the model agrees with {len(clean):,} of {len(pool):,} records and answers {len(sure):,} anew with certainty"
        )
        reasons = dict.fromkeys(clean, "the model gives the same answer") | dict.fromkeys(sure, "answered anew")
        signals = {"agreed": np.array([float(place in agreed) for place in range(len(pool))]), "doubt": doubt}
        return Choice(self.fill(pool, order, pool.of(records)), signals, reasons, records=records)

    def _likeliest(self, made: Responder, pool: Pool) -> dict[int, bool]:
        """Return, by place, of which records with choices their own is the likeliest when asked for directly and with reasoning.

        None are looked at where the likelihoods of whoever answers cannot be had.
        """
        listed = [place for place in pool.order.tolist() if pool.records[place].choices]
        if not listed or not isinstance(made, LocalResponder):
            return {}
        answering = replace(pool, load_base=lambda: made.base, make_encoder=lambda words: made.encoder)
        records = [pool.records[place] for place in listed]
        own = np.ones(len(listed), dtype=bool)
        for form in (DIRECT, REASONED):
            asked = [
                replace(record, messages=(*put(record, form.format(question=question(record))), record.messages[-1]))
                for record in records
            ]
            best = measure(answering, OfLabels(model=self.by_model or ""), asked)[:, 0]
            own &= best == np.array([record.answer for record in records])
        return dict(zip(listed, own.tolist(), strict=True))

    def _ask(self, made: Responder, pool: Pool, form: str, places: list[int], **filled: dict[int, str]) -> dict[int, Record]:
        """Return what is asked of some records and said, as conversations by place; ``filled`` are more parts of the form, by place."""
        prompts = []
        for place in places:
            record = pool.records[place]
            parts = {name: texts[place] for name, texts in filled.items()}
            prompts.append(put(record, form.format(question=question(record), **parts)))
        said = made.answers(prompts, temperature=self.temperature, max_new_tokens=self.longest, seed=pool.seed)
        return {
            place: Record("chat", (*prompt, Message("assistant", text)))
            for place, prompt, (text,) in zip(places, prompts, said, strict=True)
        }

    def _examples(self, pool: Pool, clean: list[int], noisy: list[int]) -> dict[int, str]:
        """Return, for each noisy record, its nearest clean ones with their answers."""
        if not clean or not noisy:
            return dict.fromkeys(noisy, "")
        vectors = self.embed(pool)
        near, _ = nearest(vectors[noisy], vectors[clean], self.neighbours)
        return {
            place: "\n\n".join(solved(pool.records[clean[number]]) for number in own)
            for place, own in zip(noisy, near.tolist(), strict=True)
        }

    def _doubt(self, pool: Pool, said: dict[int, Record]) -> Array:
        """Return the mean negative log-likelihood of what is said, as it was asked, infinite for no answer; not-a-number elsewhere."""
        found = np.full(len(pool), np.nan)
        if said:
            losses = measure(pool, LossAsAsked(), list(said.values()))
            some = np.array([bool(text) for text in _finals(said).values()])
            found[list(said)] = np.where(some & np.isfinite(losses), losses, np.inf)
        return found


def _wanted(record: Record) -> str:
    """Return what an answer must agree with: a record's choice, or the final answer of its response."""
    return record.response if record.choices else extract_answer(record.response)


def _finals(said: dict[int, Record]) -> dict[int, str]:
    """Return the final answers of conversations, by place."""
    return {place: final(record.response) for place, record in said.items()}
