"""Records on which a written guideline does not help: what the guideline lacks is worth learning (EDGE).

Knows: how much a guideline before a conversation raises the likelihood of each of its answers. Does not know: who writes guidelines.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from selectune.data.chat import Encoded
from selectune.data.records import Message, Record
from selectune.errors import UserError
from selectune.examples.factors.shown import turns_of
from selectune.examples.factors.signals import ResponseLoss, Signal, Worker
from selectune.examples.factors.store import measure
from selectune.examples.method import Array, Ranked, ranked
from selectune.examples.pool import Pool
from selectune.models.anatomy import context_length


def guided(record: Record, guideline: str) -> Record:
    """Return a record whose first question is asked after a guideline."""
    first, *rest = turns_of(record) or (Message("user", ""),)
    if first.role != "user":
        first, rest = Message("user", ""), [first, *rest]
    return Record("chat", (Message("user", f"{guideline}\n\n{first.content}".strip()), *rest))


def by_turn(piece: Encoded, logs: Array) -> list[Array]:
    """Return the log-probabilities of each answer of a conversation by itself: of each run of labelled tokens."""
    found, place = [], 0
    for learnt, run in groupby(label != -100 for label in piece.labels[1:]):
        if learnt:
            size = len(list(run))
            found.append(logs[place : place + size])
            place += size
    return found


class GuidelineEffect(Signal):
    """How much a guideline lowers the log-perplexity of a conversation's answers: mean over its answers, nats per token."""

    shown: ClassVar[str] = "effect of the guideline"
    guideline: str

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        assert worker is not None
        encoder = replace(worker.encoder, max_length=context_length(worker.base.model))
        told = [[encoder.encode(guided(record, text)) for record in records] for text in ("", self.guideline)]
        found = np.full(len(records), np.nan)
        both = [number for number in range(len(records)) if told[0][number] and told[1][number]]
        logs = [worker.log_probabilities([some[number][0] for number in both]) for some in told]
        for number, plain, helped in zip(both, *logs, strict=True):
            pairs = zip(by_turn(told[0][number][0], plain), by_turn(told[1][number][0], helped), strict=False)
            gains = [
                after[: len(before)].mean() - before[: len(after)].mean() for before, after in pairs if len(before) and len(after)
            ]
            found[number] = float(np.mean(gains)) if gains else np.nan
        return found


class GuidelineEffectiveness(Ranked):
    """The records whose answers a guideline makes least likelier."""

    name: ClassVar[str] = "edge"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = "EDGE: Efficient Data Selection for LLM Agents via Guideline Effectiveness, 2025, arXiv 2502.12494"
    summary: ClassVar[str] = "The lowest effect of a written guideline on the likelihood of the record's answers."
    departs: ClassVar[str] = (
        "The effect is the mean over answers of the difference in cross-entropy, which the paper measures too; whether it takes a difference or a "
        "ratio is not known for sure. The records' own answers stand for the agent's actions; nothing is rolled out or annotated. "
        "System messages are left out."
    )

    keep: Literal["highest", "lowest"] = "lowest"
    """Which end of the score trains."""
    guideline: str = ""
    """Text, or the name of a text file; left out: the target's records, as solved examples."""
    examples: Annotated[int, Field(gt=0)] = 3
    """Target records that serve as the guideline where there is none, the first by hash."""
    easiest: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the records, those that the base finds easiest without help, that come last: a guideline cannot help with them."""

    def score(self, pool: Pool) -> dict[str, Array]:
        effect, losses = measure(pool, GuidelineEffect(guideline=self.text(pool))), measure(pool, ResponseLoss())
        if np.isfinite(losses).any() and not np.isfinite(effect).any():
            raise UserError("the guideline leaves no room for answers", field="examples.guideline",
                            expected=f"fewer than {context_length(pool.base.model):,} tokens with a record")  # fmt: skip
        easy = ranked(pool, losses, highest_first=False)[: int(self.easiest * len(pool))]
        decided = effect.copy()
        decided[easy] += 1e3 if self.keep == "lowest" else -1e3
        return {"order": decided, "guideline effectiveness": effect, "loss": losses}

    def text(self, pool: Pool) -> str:
        """Return the guideline.

        Raises:
            UserError: there is none, or its file cannot be read.
        """
        if self.guideline:
            if not _is_file(self.guideline):
                if re.fullmatch(r"\S+\.\w+", self.guideline):  # nobody's guideline, but the name of a file
                    raise UserError("there is no such file", file=self.guideline, field="examples.guideline",
                                    expected="a text, or a text file that is there")  # fmt: skip
                return self.guideline
            try:
                return Path(self.guideline).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"cannot be read ({error})", file=self.guideline, field="examples.guideline",
                                expected="a text file") from None  # fmt: skip
        if not pool.target:
            raise UserError(f"'{self.name}' has no guideline", field="examples.guideline",
                            mend="give a text or a file, or --target FILE, whose records then serve")  # fmt: skip
        from selectune.parameters.factors.gradients import first

        return "\n\n".join(
            f"Question: {record.question}\nAnswer: {record.response}" for record in first(list(pool.target), self.examples)
        )


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # no name of a file at all
        return False
