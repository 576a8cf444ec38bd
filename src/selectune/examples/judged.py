"""A model says YES or NO about a record: its log-likelihoods are the score.

Knows: how a question about a record is put, and how the likelihoods of all spellings of YES and NO become a score. Does not know: what is asked.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch

from selectune.data.chat import Encoded
from selectune.data.duplicates import content
from selectune.data.records import Message, Record
from selectune.examples.factors.signals import Signal, Worker
from selectune.examples.factors.store import measure
from selectune.examples.method import Array, Ranked
from selectune.examples.pool import Pool

YES, NO = ("YES", "Yes", "yes", " YES", " Yes", " yes"), ("NO", "No", "no", " NO", " No", " no")


class YesOrNo(Signal):
    """The probability of YES against NO to questions about a record, multiplied; each question is asked after the answers before it."""

    shown: ClassVar[str] = "yes or no"
    questions: tuple[str, ...]
    characters: int = 2048
    """Of the record that are shown."""

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        assert worker is not None
        scores = np.ones(len(records))
        for asked in range(len(self.questions)):
            pieces = [self._prompt(worker, record, asked) for record in records]
            for number, hidden, _ in worker.states(pieces):
                with torch.no_grad():
                    logits = worker.loss.split.logits(hidden[-1:])[0].float()
                yes, no = (torch.logsumexp(logits[self._tokens(worker, words)], 0) for words in (YES, NO))
                scores[number] *= float(torch.sigmoid(yes - no))
        return scores

    def _prompt(self, worker: Worker, record: Record, asked: int) -> Encoded:
        lines = [f"{number + 1}. {question}" for number, question in enumerate(self.questions)]
        text = f"Read this:\n\n{content(record)[: self.characters]}\n\nAnswer each question with YES or NO only.\n" + "\n".join(
            lines
        )
        begun = "".join(f"{number + 1}. YES\n" for number in range(asked)) + f"{asked + 1}."
        ids = worker.encoder.prompt_ids((Message("user", text),)) + worker.encoder.response_ids(begun)
        ids = ids[-worker.encoder.max_length :]
        return Encoded(ids, [-100] * len(ids))

    @staticmethod
    def _tokens(worker: Worker, words: tuple[str, ...]) -> list[int]:
        encoded = [worker.base.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        return sorted({ids[0] for ids in encoded if len(ids) == 1}) or sorted({ids[0] for ids in encoded})


class Judged(Ranked):
    """The records of which the base itself would say YES."""

    name: ClassVar[str] = "yes_no"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = (
        "Autonomous Data Selection with Zero-shot Generative Classifiers for Mathematical Texts, ACL Findings 2025, arXiv 2402.07625"
    )
    summary: ClassVar[str] = (
        "The highest product of the base's YES probabilities about being on the subject and being worth learning from."
    )
    departs: ClassVar[str] = (
        "All spellings of YES and NO are summed (the code takes the largest); the second question is asked after a written YES to the first."
    )

    subject: str = "the subject of a specialist's training"
    """What the records should be about, in words."""

    def score(self, pool: Pool) -> dict[str, Array]:
        questions = (f"Is it about {self.subject}?", "Is it correct, clear and worth learning from?")
        found = measure(pool, YesOrNo(questions=questions))
        return {"yes against no": found, "log odds": np.array([math.log(v / (1 - v)) if 0 < v < 1 else math.nan for v in found])}
