"""Records that are hard for the base, found by judging few of them.

Knows: how some records are judged, a classifier of the rest that grows with the judgements, and likeness to what was judged hard. Does not know: who
judges.
"""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from selectune.data.records import Message, Record
from selectune.examples.diverse import Embedded
from selectune.examples.factors.asking import put, question, questions_only
from selectune.examples.factors.nearest import nearest
from selectune.examples.factors.signals import ResponseLoss
from selectune.examples.factors.store import measure
from selectune.examples.factors.strata import fair_shares, k_means, members, proportional_shares, round_robin
from selectune.examples.method import Array, Choice, ranked
from selectune.examples.pool import Pool
from selectune.inference.local import LocalResponder
from selectune.inference.remembering import Rehearsal
from selectune.inference.responder import Asking, Responder, kept_in, responder

COMPARED = (
    "Which of two replies answers the question better: more helpful, more accurate, more complete?\n"
    "Reply with one letter: A, B, or C where they are equally good.\n\nQuestion:\n{question}\n\nReply A:\n{first}\n\nReply B:\n{second}"
)
HELD = 5
"""Every so many-th judged record tells how good the classifier is, and does not teach it."""


class HardRecords(Asking, Embedded):
    """Records whose reference the base does not reach."""

    name: ClassVar[str] = "iter_select_tune"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = (
        "IterSelectTune: An Iterative Training Framework for Efficient Instruction-Tuning Data Selection, 2024, arXiv 2410.13464"
    )
    summary: ClassVar[str] = (
        "Records like those whose reference beat the base's own answer, by a classifier that is taught in rounds of judging."
    )
    departs: ClassVar[str] = (
        "The classifier is a logistic one on embeddings instead of BERT. A judge sees both orders and may call a draw; without a judge a record is "
        "hard where the reference is less likely than the base's own answer by more than is usual among the first that are judged. The "
        "same top share of each cluster trains, so that few easy records may come with many hard ones; how the paper spreads it is not known. "
        "A later round judges the best by quality, whether or not the classifier calls them hard. Clusters, rounds, sizes and alpha are ours."
    )

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the pool that trains."""
    clusters: Annotated[int, Field(gt=0)] = 32
    """Groups from which the first records to be judged are taken evenly, and the best ones in proportion."""
    start: Annotated[int, Field(gt=0)] = 200
    """Records that are judged at first."""
    more: Annotated[int, Field(gt=0)] = 200
    """Records that are judged in each later round."""
    rounds: Annotated[int, Field(gt=0)] = 3
    """Of judging."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.7
    """How much the classifier counts, against likeness to hard records."""
    margin: float | None = None
    """Without a judge: nats per token by which the reference must be less likely than the base's own answer; left out: the median of the first
    round, as a greedy answer is nearly always the likelier one."""
    longest: Annotated[int, Field(gt=0)] = 128
    """Tokens of the base's own answer."""

    def choose(self, pool: Pool) -> Choice:
        questions_only(pool.records, self.name)
        vectors = self.embed(pool)
        labels, _ = k_means(vectors, self.clusters, pool.seed, pool.order)
        groups = members(labels, ranked(pool, pool.uniform(self.name)))
        wanted = round_robin(groups, fair_shares([len(group) for group in groups], self.start))[: self.start]
        judge = None if self.by_endpoint is None and self.by_model is None else responder(self, pool)
        hard, asked, margin = np.full(len(pool), np.nan), np.zeros(len(pool), dtype=bool), self.margin
        for _ in range(self.rounds):
            asked[wanted] = True
            records = [pool.records[place] for place in wanted.tolist()]
            if judge is not None:
                hard[wanted] = self._judged(pool, judge, records)
            else:
                gaps = self._gaps(pool, records)
                if margin is None and np.isfinite(gaps).any():
                    margin = float(np.nanmedian(gaps))
                hard[wanted] = np.where(np.isfinite(gaps), gaps > (margin or 0.0), np.nan)
            quality, signals = self._quality(pool, vectors, hard)
            wanted = np.array([place for place in ranked(pool, quality).tolist() if not asked[place]], np.int64)[: self.more]
            if not len(wanted):
                break
        pool.notes += self._told(pool, vectors, hard, margin if judge is None else None)
        if unknown := int((asked & np.isnan(hard)).sum()):
            pool.notes.append(f"{unknown:,} records could not be judged: nothing of their answers is left to learn")
        groups = members(labels, ranked(pool, quality))
        sizes = [len(group) for group in groups]
        places = round_robin(groups, proportional_shares(sizes, self.about(pool), sizes))
        signals = {"quality": quality, **signals, "judged hard": hard, "cluster": labels.astype(np.float64)}
        return Choice(self.fill(pool, places), signals)

    def _told(self, pool: Pool, vectors: Array, hard: Array, margin: float | None) -> list[str]:
        """Return what a person should know of the judgements."""
        count, judged = int(np.nansum(hard)), int(np.isfinite(hard).sum())
        right, of = self._accuracy(pool, vectors, hard)
        told = [
            f"{count:,} of {judged:,} judged records are hard; the classifier is right on {right:,} of {of:,} that did not teach"
        ]
        if margin is not None:
            told.append(f"hard are references that lose over {margin:.3g} nats per token more than the base's own answer")
        if count in (0, judged):
            told.append("what was judged is all of one kind, so the classifier learnt nothing: difficulty hardly counts")
        return told

    # -- what a few judgements say of all ----------------------------------------------------------------------------------

    def _quality(self, pool: Pool, vectors: Array, hard: Array) -> tuple[Array, dict[str, Array]]:
        """Return the quality of all records, ``(records,)``, and its two parts."""
        likely = _taught(vectors, hard, [place for place in pool.order.tolist() if np.isfinite(hard[place])])
        known = [place for place in pool.order.tolist() if hard[place] == 1]
        alike = nearest(vectors, vectors[known], 1)[1][:, 0].astype(np.float64) if known else np.zeros(len(pool))
        return self.alpha * likely + (1 - self.alpha) * alike, {"likely to be hard": likely, "like hard ones": alike}

    def _accuracy(self, pool: Pool, vectors: Array, hard: Array) -> tuple[int, int]:
        """Return on how many judged records a classifier is right that was taught by the others, and how many they are.

        Records that ask the same, word for word, are on one side.
        """
        judged = [place for place in pool.order.tolist() if np.isfinite(hard[place])]
        held = [place for place in judged if int(sha256(pool.records[place].question.encode()).hexdigest(), 16) % HELD == 0]
        out = set(held)
        likely = _taught(vectors, hard, [place for place in judged if place not in out])
        return int(((likely[held] > 0.5) == (hard[held] == 1)).sum()), len(held)

    # -- judging -----------------------------------------------------------------------------------------------------------

    def _judged(self, pool: Pool, judge: Responder, records: list[Record]) -> Array:
        """Return 1 for records that a judge finds hard and 0 for others, ``(records,)``."""
        pairs = [(record, text, record.response) for record, text in zip(records, self._own(pool, records), strict=True)]
        turned = [(record, reference, text) for record, text, reference in pairs]
        prompts = [
            put(record, COMPARED.format(question=question(record), first=one, second=other))
            for record, one, other in [*pairs, *turned]
        ]
        verdicts = [_letter(text) for (text,) in judge.answers(prompts, max_new_tokens=8)]
        votes = np.array([(said == "B") - (said == "A") for said in verdicts[: len(pairs)]])
        votes += np.array([(said == "A") - (said == "B") for said in verdicts[len(pairs) :]])
        return (votes > 0).astype(np.float64)

    def _gaps(self, pool: Pool, records: list[Record]) -> Array:
        """Return by how much the reference's loss is above that of the base's own answer, nats per token, ``(records,)``."""
        own = [Record("chat", (*record.prompt, Message("assistant", text)))
               for record, text in zip(records, self._own(pool, records), strict=True)]  # fmt: skip
        return measure(pool, ResponseLoss(), records) - measure(pool, ResponseLoss(), own)

    def _own(self, pool: Pool, records: list[Record]) -> list[str]:
        """Return the base's own answers."""
        rehearsal = None if pool.rehearsal is None else Rehearsal()  # what the base writes is not what is paid for
        base = LocalResponder(pool.base, pool.encoder, pool.meter, kept_in(pool), pool.quiet, rehearsal)
        return [text for (text,) in base.answers([record.prompt for record in records], max_new_tokens=self.longest)]


def _taught(vectors: Array, hard: Array, places: list[int]) -> Array:
    """Return how likely each record is to be hard, ``(records,)``, by a classifier that some judged records teach."""
    from sklearn.linear_model import LogisticRegression

    known = hard[places]
    if len(np.unique(known)) < 2:
        return np.full(len(vectors), known.mean() if len(known) else 0.5)
    return LogisticRegression(max_iter=1000, class_weight="balanced").fit(vectors[places], known).predict_proba(vectors)[:, 1]


def _letter(text: str) -> str:
    found = re.search(r"\b([ABC])\b", text)
    return found[1] if found else ""
