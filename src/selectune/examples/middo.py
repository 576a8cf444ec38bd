"""Records that do not help the model as it is are found by three signs and written anew, round after round.

Knows: the three signs (losses that stay high, questions far from all others, low quality) and their limits, what is written in place of such records,
and the loop. Does not know: how a model is trained for a short while, or who writes.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from selectune.data.records import Message, Record
from selectune.errors import UserError
from selectune.examples.factors.asking import put, questions_only
from selectune.examples.factors.learnt import Learnt
from selectune.examples.factors.nearest import nearest
from selectune.examples.factors.signals import OwnEmbedding, ResponseLoss
from selectune.examples.factors.store import measure
from selectune.examples.method import Array, Choice, ExampleMethod
from selectune.examples.pool import Pool
from selectune.examples.self_scoring import difficulty
from selectune.inference.local import LocalResponder
from selectune.inference.responder import Asking, Responder, responder

SIMPLER = (
    "This question is too hard for a small language model to learn from. Write a simpler one that teaches the same, complete in itself.\n"
    "Reply with the new question and nothing else.\n\nQuestion:\n{question}"
)
CLEARER = (
    "This question is unclear, incomplete or wrong in what it presupposes. Write it anew: clear, complete, true.\n"
    "Reply with the new question and nothing else.\n\nQuestion:\n{question}"
)
ANOTHER = (
    "Write a new question in the spirit of these, on something that none of them asks, complete in itself.\n"
    "Reply with the new question and nothing else.\n\nThe question to start from:\n{question}\n\nOthers:\n{others}"
)
RATED = (
    "Rate the {what} below for {quality} on a scale from 0 (none) to 10 (perfect). Reply with one number and nothing else.\n\n"
    "Question:\n{question}{answer}"
)
QUALITIES = ("clarity", "completeness", "factual correctness")


def beyond(values: Array, spread: float, side: int, sample: int = 0) -> Array:
    """Return which values lie so many standard deviations above (side 1) or below (-1) the mean, ``(n,)`` bool; none that is not finite.

    Args:
        sample: 1 for the standard deviation of a sample, 0 for a population's.
    """
    known = values[np.isfinite(values)]
    if len(known) < 2:
        return np.zeros(len(values), dtype=bool)
    limit = known.mean() + side * spread * known.std(ddof=sample)
    with np.errstate(invalid="ignore"):
        return np.isfinite(values) & ((values - limit) * side > 0)


class DynamicOptimisation(Asking, ExampleMethod):
    """The pool with its unhelpful records written anew."""

    name: ClassVar[str] = "middo"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = (
        "Middo: Model-Informed Dynamic Data Optimization for Enhanced LLM Fine-Tuning via Closed-Loop Learning, EMNLP 2025, arXiv 2508.21589"
    )
    summary: ClassVar[str] = (
        "Records that stay hard, questions that stand alone and records of low quality are found by the model as it learns and written anew."
    )
    departs: ClassVar[str] = (
        "Quality is instruction-following difficulty unless the model is to rate itself; the tuned model is a short trial. A new question beside a "
        "lonely one stands in for the pool's most crowded record, so that the size stays. A record that is both too hard and of low quality is "
        "asked for in simpler words alone. Records with a closed set of answers are not rewritten; "
        "what stays flagged comes last. The base writes where no other model is named. Where nothing is written, a lonely record weighs double."
    )
    changes: ClassVar[bool] = True

    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the pool that trains."""
    rounds: Annotated[int, Field(gt=0)] = 1
    """Of diagnosis and repair (the paper: several); where records are dropped, one."""
    spread: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviations from the mean at which a record is flagged (m)."""
    neighbours: Annotated[int, Field(gt=0)] = 2
    """Like questions by which one is found to stand alone."""
    quality: Literal["difficulty", "rating"] = "difficulty"
    """``difficulty``: a prompt that helps little with its response; ``rating``: the tuned model's own, from 0 to 10."""
    repair: Literal["rewrite", "drop"] = "rewrite"
    """``drop``: nothing is written; records that are too hard or of low quality are left out, lonely ones weigh double."""
    steps: Annotated[int, Field(gt=0)] = 60
    """Of the training whose model diagnoses."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Of that training."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of what is written."""
    longest: Annotated[int, Field(gt=0)] = 256
    """Tokens of what is written."""

    def choose(self, pool: Pool) -> Choice:
        questions_only(pool.records, self.name)
        writer = responder(self, pool) if self.repair == "rewrite" else None
        now = pool
        for _ in range(self.rounds if writer is not None else 1):
            signs, flags, near = self._diagnosis(now)
            if writer is not None:
                records, flags = self._repaired(now, writer, signs, flags, near)
                now = pool.of(records)
        drawn, bad = pool.uniform(self.name), flags["complexity"] | flags["quality"]
        places = self.fill(pool, sorted(pool.order.tolist(), key=lambda place: (bad[place], drawn[place])), now)
        signals = signs | {f"flagged: {name}": values.astype(np.float64) for name, values in flags.items()}
        if writer is None:
            return Choice(places, signals, weights=self._weights(pool, bad[places], flags["diversity"][places]))
        changed = [place for place, key in enumerate(now.keys) if key != pool.keys[place]]
        pool.notes.append(f"{len(changed):,} of {len(pool):,} records were written anew; {int(bad.sum()):,} stay flagged")
        return Choice(places, signals, dict.fromkeys(changed, "written anew"), records=now.records)

    def _weights(self, pool: Pool, bad: Array, lonely: Array) -> Array:
        """Return the weights of chosen records where nothing is written, ``(n,)``, on average 1 over those that stay.

        Raises:
            UserError: none stays.
        """
        if bad.all():
            raise UserError("no record is left", field="examples.spread", expected=f"more than {self.spread:g}")
        alone = int((lonely & ~bad).sum())
        pool.notes.append(f"{int(bad.sum()):,} records are left out; {alone:,} that stand alone weigh double")
        weights = np.where(bad, 0.0, 1.0 + lonely)
        return weights / weights[~bad].mean()

    # -- diagnosis ---------------------------------------------------------------------------------------------------------

    def _diagnosis(self, pool: Pool) -> tuple[dict[str, Array], dict[str, Array], Array]:
        """Return the signs, the flags, and each record's nearest others, ``(records, neighbours)``."""
        tuned = Learnt(pool, self.steps, self.learning_rate)
        before, after = measure(pool, ResponseLoss()), tuned.losses()
        near, likeness = self._near(pool, tuned.model)
        alone = likeness.mean(1) if likeness.shape[1] else np.full(len(pool), np.nan)
        quality = self._rating(pool, tuned.model) if self.quality == "rating" else -next(iter(difficulty(pool).values()))
        signs = {"loss": before, "loss after": after, "likeness to its neighbours": alone, "quality": quality}
        flags = {
            "complexity": beyond(before, self.spread, 1) & beyond(after, self.spread, 1),
            "diversity": beyond(alone, self.spread, -1),
            "quality": beyond(quality, self.spread, -1, sample=1),
        }
        return signs, flags, near

    def _near(self, pool: Pool, tuned: Any) -> tuple[Array, Array]:
        signal, worker, order = OwnEmbedding(of="question"), pool.worker(tuned), pool.order
        parts = [
            signal.measure(worker, [pool.records[place] for place in order[start : start + 64].tolist()])
            for start in range(0, len(order), 64)
        ]
        near, likeness = nearest(np.concatenate(parts), np.concatenate(parts), self.neighbours, themselves=True)
        places, values = np.empty_like(near), np.empty(likeness.shape)
        places[order], values[order] = order[near] if near.size else near, likeness
        return places, values

    def _rating(self, pool: Pool, tuned: Any) -> Array:
        """Return how the tuned model rates each record: questions and answers, on three scales, averaged."""
        rehearsal = None if pool.rehearsal is None else type(pool.rehearsal)()
        made = LocalResponder(replace(pool.base, model=tuned), pool.encoder, pool.meter, quiet=pool.quiet, rehearsal=rehearsal)
        total = np.zeros(len(pool))
        for quality in QUALITIES:
            for what in ("question", "answer"):
                prompts = [
                    [Message("user", RATED.format(what=what, quality=quality, question=record.question,
                                                  answer=f"\n\nAnswer:\n{record.response}" if what == "answer" else ""))]
                    for record in pool.records
                ]  # fmt: skip
                total += [rating(text) for (text,) in made.answers(prompts, max_new_tokens=8)]
        return total / (2 * len(QUALITIES))

    # -- repair ------------------------------------------------------------------------------------------------------------

    def _repaired(
        self, pool: Pool, writer: Responder, signs: dict[str, Array], flags: dict[str, Array], near: Array
    ) -> tuple[list[Record], dict[str, Array]]:
        """Return the records after repair, and the flags of those that were not repaired."""
        jobs = self._jobs(pool, signs["likeness to its neighbours"], flags, near)
        asked = self._written(writer, pool, [(source, text) for source, _, text in jobs])
        jobs = [(source, place, text) for (source, place, _), text in zip(jobs, asked, strict=True) if text]
        said = self._written(writer, pool, [(source, text) for source, _, text in jobs])
        records, left = list(pool.records), {name: values.copy() for name, values in flags.items()}
        for (source, place, question), answer in zip(jobs, said, strict=True):
            if not answer:
                continue
            turns = (*put(pool.records[source], question), Message("assistant", answer))
            records[place] = Record("chat", turns, source=pool.records[place].source, line=pool.records[place].line)
            for name in ("complexity", "quality") if source == place else ("diversity",):
                left[name][source] = False
        return records, left

    def _jobs(self, pool: Pool, alone: Array, flags: dict[str, Array], near: Array) -> list[tuple[int, int, str]]:
        """Return what is to be written: after which record, in whose place, and the instruction."""
        open_ones = [place for place in pool.order.tolist() if not pool.records[place].choices]
        bad = flags["complexity"] | flags["quality"]
        jobs = [
            (place, place, (SIMPLER if flags["complexity"][place] else CLEARER).format(question=pool.records[place].question))
            for place in open_ones
            if bad[place]
        ]
        lonely = [place for place in open_ones if flags["diversity"][place]]
        crowded = sorted(
            (place for place in open_ones if not bad[place] and not flags["diversity"][place]), key=lambda place: -alone[place]
        )
        for place, other in zip(lonely, crowded, strict=False):
            others = "\n".join(pool.records[neighbour].question for neighbour in near[place].tolist())
            jobs.append((place, other, ANOTHER.format(question=pool.records[place].question, others=others)))
        return jobs

    def _written(self, writer: Responder, pool: Pool, asked: list[tuple[int, str]]) -> list[str]:
        prompts = [put(pool.records[source], text) for source, text in asked]
        said = writer.answers(prompts, temperature=self.temperature, max_new_tokens=self.longest, seed=pool.seed)
        return [text.strip() for (text,) in said]


def rating(text: str) -> float:
    """Return the first number of a text, between 0 and 10; 0 where there is none."""
    found = re.search(r"\d+(?:\.\d+)?", text)
    return min(float(found[0]), 10.0) if found else 0.0
