"""A model says YES or NO about a record: its log-likelihoods are the score.

Knows: how a question about a record is put, and how the likelihoods of all spellings of YES and NO become a score. Does not know: what is asked.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field

from selectune.data.chat import Encoded
from selectune.data.duplicates import content, normalise
from selectune.data.records import Message, Record
from selectune.errors import UserError
from selectune.examples.factors.signals import Signal, Worker
from selectune.examples.factors.store import measure
from selectune.examples.method import Array, Ranked
from selectune.examples.pool import Pool
from selectune.inference.responder import Asking, responder
from selectune.models import load_base
from selectune.models.anatomy import within_context

YES, NO = ("YES", "Yes", "yes", " YES", " Yes", " yes"), ("NO", "No", "no", " NO", " No", " no")


class YesOrNo(Signal):
    """The probability of YES against NO to questions about a record, multiplied; each question is asked after the answers before it."""

    shown: ClassVar[str] = "yes or no"
    questions: tuple[str, ...]
    characters: int = 4096
    """Of the record that are shown."""
    judge: str = ""
    """The judge's name, where it is not the base."""

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        assert worker is not None
        scores = np.ones(len(records))
        begins = self._begins(worker)
        for asked in range(len(self.questions)):
            pieces = [self._prompt(worker, record, asked) for record in records]
            for number, hidden, _ in worker.states(pieces):
                with torch.no_grad():
                    logits = worker.loss.split.logits(hidden[-1:])[0].float().cpu()
                yes, no = (torch.logsumexp(logits[tokens], 0) for tokens in begins)
                scores[number] *= float(torch.sigmoid(yes - no))
        return scores

    def _prompt(self, worker: Worker, record: Record, asked: int) -> Encoded:
        lines = [f"{number + 1}. {question}" for number, question in enumerate(self.questions)]
        text = f"Read this:\n\n{content(record)[: self.characters]}\n\nAnswer each question with YES or NO only.\n" + "\n".join(
            lines
        )
        begun = "".join(f"{number + 1}. YES\n" for number in range(asked)) + f"{asked + 1}."
        ids = worker.encoder.prompt_ids((Message("user", text),)) + worker.encoder.response_ids(begun)
        ids = list(within_context(worker.base.model, ids))
        return Encoded(ids, [-100] * len(ids))

    @staticmethod
    def _begins(worker: Worker) -> list[list[int]]:
        """Return the tokens that say YES and those that say NO: spellings of one token, or else what spellings begin with.

        Raises:
            UserError: they begin alike.
        """
        found = []
        for words in (YES, NO):
            spelled = [worker.base.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
            found.append({ids[0] for ids in spelled if len(ids) == 1} or {ids[0] for ids in spelled})
        yes, no = found[0] - found[1], found[1] - found[0]
        if not yes or not no:
            raise UserError("the judge's tokens do not tell YES from NO", field="examples.by_model",
                            expected="a model to which they begin differently", mend="let another model judge")  # fmt: skip
        return [sorted(yes), sorted(no)]


class Judged(Asking, Ranked):
    """The records of which the base itself, or another model, would say YES."""

    name: ClassVar[str] = "yes_no"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = (
        "Autonomous Data Selection with Zero-shot Generative Classifiers for Mathematical Texts, ACL Findings 2025, arXiv 2402.07625"
    )
    summary: ClassVar[str] = (
        "The highest product of the base's YES probabilities about being on the subject and being worth learning from."
    )
    departs: ClassVar[str] = (
        "All spellings of YES and NO are summed (the code takes the largest); the second question, in words of ours, is asked after a written YES to "
        "the first. An endpoint gives words: the score is the share of YES, and the second question is asked by itself."
    )

    subject: str = "the subject of a specialist's training"
    """What the records should be about, in words."""

    samples: Annotated[int, Field(gt=0)] = 1
    """Answers that an endpoint gives to each question; its probability of YES is their share."""

    def score(self, pool: Pool) -> dict[str, Array]:
        questions = (f"Is it about {self.subject}?", "Is it correct, clear and worth learning from?")
        if self.by_endpoint is not None:
            return {"yes against no": self._share_of_yes(pool, questions)}
        if self.by_model is not None:
            judge = load_base(self.by_model, dtype="auto" if pool.bfloat16 else "float32")
            pool = replace(pool, load_base=lambda: judge)
        found = measure(pool, YesOrNo(questions=questions, judge=self.by_model or ""))
        return {"yes against no": found, "log odds": np.array([math.log(v / (1 - v)) if 0 < v < 1 else math.nan for v in found])}

    def _share_of_yes(self, pool: Pool, questions: tuple[str, ...]) -> Array:
        """Ask an endpoint, which gives words instead of likelihoods: a later question only where an earlier one was not denied."""
        made, scores = responder(self, pool), np.ones(len(pool))
        for asked in questions:
            left = np.nonzero(scores)[0].tolist()
            shown = [content(pool.records[place])[: YesOrNo.model_fields["characters"].default] for place in left]
            prompts = [[Message("user", f"Read this:\n\n{text}\n\n{asked} Answer with YES or NO only.")] for text in shown]
            said = made.answers(
                prompts, samples=self.samples, temperature=float(self.samples > 1), max_new_tokens=8, seed=pool.seed
            )
            for place, answers in zip(left, said, strict=True):
                scores[place] *= sum(normalise(one).startswith("yes") for one in answers) / self.samples
        return scores
