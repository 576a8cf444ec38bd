"""Of two styles of answering, the one that helps the base more: shown as an example, which of a question's answers lets it answer others?

Knows: how well anchors are answered behind one answer or another, and how the difference decides between them. Does not know: how a style is told.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from selectune.data.records import Record
from selectune.errors import UserError
from selectune.examples.among_answers import AmongAnswers, by_question
from selectune.examples.factors.shown import after_shot
from selectune.examples.factors.signals import SentenceEmbedding, Signal, Worker
from selectune.examples.factors.store import measure
from selectune.examples.factors.strata import k_means
from selectune.examples.method import Array, ranked
from selectune.examples.pool import Pool
from selectune.examples.tags import style
from selectune.models.anatomy import context_length


class OneShot(Signal):
    """How well anchors are answered behind a record, shown as an example, on average: nats of their answers, or the share that is right."""

    shown: ClassVar[str] = "one-shot answers to anchors"
    anchors: tuple[Record, ...]
    """None of them is asked behind its own question."""
    right: bool = False
    """Whether the greedy answer, token by token, is the anchor's."""

    def settings(self) -> dict[str, object]:
        return {"anchors": [anchor.key for anchor in self.anchors], "right": self.right}

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        assert worker is not None
        longest, owners, pieces = context_length(worker.base.model), [], []
        for number, record in enumerate(records):
            for anchor in self.anchors:
                piece = after_shot(worker.encoder, (record.question, record.response), anchor, longest)
                if anchor.question != record.question and piece is not None:
                    owners.append(number)
                    pieces.append(piece)
        sums, counts = np.zeros(len(records)), np.zeros(len(records))
        for member, hidden, labels in worker.states(pieces):
            places = (labels[1:] != -100).nonzero().squeeze(-1)
            with torch.no_grad():
                logits, wanted = worker.loss.split.logits(hidden[places]).float(), labels[places + 1]
            if self.right:
                sums[owners[member]] += bool((logits.argmax(-1) == wanted).all())
            else:
                sums[owners[member]] += float(logits.log_softmax(-1).gather(1, wanted[:, None]).sum())
            counts[owners[member]] += 1
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


class Aptitude(AmongAnswers):
    """For each question with answers in two styles, the style that helps the base more, or both where it matters little."""

    name: ClassVar[str] = "tata"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = (
        "Teaching LLMs According to Their Aptitude: Adaptive Switching Between CoT and TIR for Mathematical Problem Solving, CPAL 2026, "
        "arXiv 2502.12022"
    )
    summary: ClassVar[str] = (
        "Of two styles of a question's answers the one that, as an example, lets the base answer other questions."
    )
    departs: ClassVar[str] = (
        "Styles are told by form; anchors are answered as the target's records (or the pool's shortest answers) say, by likelihood unless accuracy "
        "is asked for, and no program is run; questions near to each other share one measurement; one set of anchors "
        "serves all records (the authors' code: 100 for each data set), and no question is its own anchor (there it "
        "may be), of which there are fewer. The values of the paper's quantiles are not known; 0.4 and 0.6 are ours."
    )

    style: Literal["code", "steps", "list", "number", "long", "longest"] = "code"
    """What tells one style from the other: code, numbered steps, a list, digits, more than 150 words; or the longest of a question's answers."""
    score: Literal["likelihood", "accuracy"] = "likelihood"
    """Of the anchors' answers behind an example; accuracy says little of a base that gets few right."""
    anchors: Annotated[int, Field(gt=1)] = 16
    """Questions that are answered behind each example: the most typical of as many clusters (the paper: 100)."""
    measured: Annotated[int, Field(gt=0)] = 64
    """Questions whose answers are shown as examples: the most typical of as many clusters; the others of a cluster go the same way."""
    lower: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Quantile of the differences (first style minus second) of a source below which the second style alone is kept; with both quantiles the
    same, only what lies exactly there keeps both."""
    upper: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Quantile above which the first alone is."""

    def suited(self, pool: Pool) -> tuple[Array, dict[str, Array]]:
        if self.lower > self.upper:
            raise UserError("lies above `upper`", field="examples.lower", expected=f"at most {self.upper:g}")
        groups = list(by_question(pool).values())
        first = self.in_first_style(pool, groups)
        paired = [places for places in groups if {bool(first[place]) for place in places} == {True, False}]
        difference = np.full(len(pool), np.nan)
        kept = np.ones(len(pool), dtype=bool)
        if paired:
            found = self.differences(pool, paired, first)
            sources = np.array([pool.records[places[0]].source for places in paired])
            for source in np.unique(sources):  # some sources suit one style more than others do
                of_source = np.flatnonzero(sources == source)
                measured = found[of_source][np.isfinite(found[of_source])]
                low, high = np.quantile(measured, [self.lower, self.upper]) if len(measured) else (-np.inf, np.inf)
                for number in of_source.tolist():
                    for place in paired[number]:
                        difference[place] = own = float(found[number])
                        kept[place] = not (own > high and not first[place]) and not (own < low and first[place])
        else:
            pool.notes.append(f"no question has answers in both styles (style: {self.style}); all answers are kept")
        clear = np.abs(difference - np.nanmedian(difference)) if np.isfinite(difference).any() else difference
        order = ranked(pool, clear)
        return order[kept[order]], {"difference": difference, "first style": first.astype(np.float64)}

    def in_first_style(self, pool: Pool, groups: list[list[int]]) -> Array:
        """Return which records are in the first style, ``(records,)`` bool."""
        if self.style != "longest":
            return np.array([self.style in style(record) for record in pool.records])
        found = np.zeros(len(pool), dtype=bool)
        for places in groups:
            lengths = [len(pool.records[place].response) for place in places]
            found[places] = [len(places) > 1 and length == max(lengths) > min(lengths) for length in lengths]
        return found

    def differences(self, pool: Pool, paired: list[list[int]], first: Array) -> Array:
        """Return by how much the first style helps more with each question, ``(questions,)``; not-a-number where that is not known."""
        examples = [
            tuple(next(place for place in places if bool(first[place]) == wanted) for wanted in (True, False))
            for places in paired
        ]
        asked = measure(pool, SentenceEmbedding(), [pool.records[one] for one, _ in examples])
        typical, labels = typical_of(asked, self.measured, pool.seed)
        signal = OneShot(anchors=self.chosen_anchors(pool), right=self.score == "accuracy")
        shown = [pool.records[place] for number in typical for place in examples[number]]
        one, other = measure(pool, signal, shown).reshape(-1, 2).T
        found = (one - other)[labels]
        if unknown := int(np.isnan(found).sum()):
            pool.notes.append(
                f"{unknown:,} questions have no example that could be measured: neither of their styles is preferred"
            )
        return found

    def chosen_anchors(self, pool: Pool) -> tuple[Record, ...]:
        """Return the questions to answer, each once and with the shortest answer that is known of it."""
        each: dict[str, Record] = {}
        for record in sorted(pool.target or pool.records, key=lambda record: (len(record.response), record.key)):
            if record.prompt:
                each.setdefault(record.question, record)
        known = sorted(each.values(), key=lambda record: record.key)
        typical, _ = typical_of(measure(pool, SentenceEmbedding(), known), self.anchors, pool.seed)
        return tuple(known[place] for place in typical)


def typical_of(vectors: Array, count: int, seed: int) -> tuple[list[int], Array]:
    """Return the place nearest to the centre of each of so many clusters, and the cluster of each place."""
    if len(vectors) <= count:
        return list(range(len(vectors))), np.arange(len(vectors))
    labels, centres = k_means(vectors, count, seed)
    kinds, labels = np.unique(labels, return_inverse=True)
    near = [np.flatnonzero(labels == new) for new in range(len(kinds))]
    return [int(own[((vectors[own] - centres[old]) ** 2).sum(1).argmin()]) for old, own in zip(kinds, near, strict=True)], labels
