"""A foundation that is like the target, and beside it what is rare or still hard after learning the foundation.

Knows: importance resampling by hashed n-grams, which tags are a long tail, and how a budget is shared by both phases. Does not know: how records
are tagged or trained on.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from selectune.data.duplicates import content, drop_exact, drop_near
from selectune.data.records import Record
from selectune.examples.diverse import Embedded
from selectune.examples.factors.learnt import Learnt
from selectune.examples.method import Array, Choice, ranked
from selectune.examples.pool import Pool
from selectune.examples.tags import tags


class TwoPhases(Embedded):
    """Most of the budget like the target, the rest from the long tail and from what is hard for a base that has learnt the first part."""

    name: ClassVar[str] = "infinity_instruct"
    family: ClassVar[str] = "target"
    paper: ClassVar[str] = (
        "Infinity Instruct: Scaling Instruction Selection and Synthesis to Enhance Language Models, 2025, arXiv 2506.11116"
    )
    summary: ClassVar[str] = "Importance resampling toward the target; then records of rare tags, or that stay hard, are added."
    departs: ClassVar[str] = (
        "Selection alone: nothing is evolved or synthesised, and both phases train together. One filter for all areas (the paper mixes several); "
        "tags are found without a model; shares and percentiles are ours, and what ties with the last hard record is hard. Half of the target's "
        "distribution of words is the pool's: with plain counts of a few target records the shortest records of the pool win. "
        "Copies come last."
    )
    needs_target: ClassVar[bool] = True

    foundation: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Share of the budget for the first phase."""
    buckets: Annotated[int, Field(gt=1)] = 10_000
    """Into which words and pairs of words are hashed."""
    scales: tuple[Annotated[int, Field(gt=0)], ...] = (32,)
    """Numbers of clusters that give a tag each, beside the question's first words and the answer's form."""
    rare: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Percentile of the tags' frequencies up to which a tag is long tail; and share of the records that counts as hard."""
    steps: Annotated[int, Field(gt=0)] = 60
    """Of the short training on the foundation."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Of the short training."""

    def choose(self, pool: Pool) -> Choice:
        kept = without_duplicates(pool)
        distinct = np.flatnonzero(kept)
        once = pool.of([pool.records[place] for place in distinct.tolist()])
        logs = log_importance(once.records, pool.target, self.buckets)
        drawn = ranked(once, logs - np.log(-np.log(np.clip(once.uniform("importance"), 1e-300, 1 - 1e-16))))
        first = drawn[: round(self.foundation * self.about(pool))]
        records = [once.records[place] for place in (first if len(first) else drawn[:1]).tolist()]
        losses = Learnt(once, self.steps, self.learning_rate, records).losses()
        seeds = long_tail(tags(once, self.embed(once), self.scales, least=1), self.rare) | hardest(losses, self.rare)
        rest = np.isin(np.arange(len(once)), first, invert=True)
        by_loss = ranked(once, losses)
        second, others = by_loss[(rest & seeds)[by_loss]], by_loss[(rest & ~seeds)[by_loss]]
        weights = np.exp(logs - logs.max())
        phase, importance, loss = np.full(len(pool), np.nan), np.zeros(len(pool)), np.full(len(pool), np.nan)
        phase[distinct[first]], phase[distinct[second]] = 1, 2
        importance[distinct], loss[distinct] = weights / weights.sum(), losses
        return Choice(
            self.fill(pool, [*distinct[first], *distinct[second], *distinct[others], *pool.order[~kept[pool.order]]]),
            {"phase": phase, "importance": importance, "loss after the first phase": loss},
        )


def log_importance(records: Sequence[Record], target: Sequence[Record], buckets: int) -> Array:
    """Return the logarithm of ``p_target / p_pool`` of each record, both bags of hashed words and pairs of words; ``(records,)``.

    Half of the target's distribution is the pool's, so that a word that a small target happens to lack halves a record's weight. Records are read
    twice, none of their counts is kept.
    """
    wanted, pooled = _distribution(target, buckets), _distribution(records, buckets)
    ratio = np.log((1 + np.divide(wanted, pooled, out=np.zeros(buckets), where=pooled > 0)) / 2)
    return np.array([ratio[_hashed(record, buckets)].sum() for record in records])


def _hashed(record: Record, buckets: int) -> Array:
    words = re.findall(r"\w+|[^\w\s]", content(record).lower())
    grams = [*words, *(f"{one} {other}" for one, other in pairwise(words))]
    return np.array([zlib.crc32(gram.encode()) % buckets for gram in grams], dtype=np.int64)


def _distribution(records: Sequence[Record], buckets: int) -> Array:
    total = np.zeros(buckets)
    for record in records:
        np.add.at(total, _hashed(record, buckets), 1)
    return total / max(total.sum(), 1)


def without_duplicates(pool: Pool) -> Array:
    """Return which records are not nearly what an earlier one (by content) is, ``(records,)`` bool."""
    by_content = [pool.records[place] for place in pool.order.tolist()]
    once = {id(record) for record in drop_near(drop_exact(by_content)[0])[0]}
    kept = np.zeros(len(pool), dtype=bool)
    for place, record in zip(pool.order.tolist(), by_content, strict=True):
        kept[place] = id(record) in once
        once.discard(id(record))
    return kept


def hardest(losses: Array, share: float) -> Array:
    """Return which records are that share of those with a loss, ``(records,)`` bool; all that tie with the last are."""
    known = losses[np.isfinite(losses)]
    return losses >= np.quantile(known, 1 - share) if len(known) else np.zeros(len(losses), dtype=bool)


def long_tail(tagged: list[set[str]], percentile: float) -> Array:
    """Return which records have a tag whose frequency is at most that percentile of the tags' frequencies, ``(records,)`` bool."""
    counts = Counter(tag for own in tagged for tag in own)
    if not counts:
        return np.zeros(len(tagged), dtype=bool)
    limit = np.quantile(np.array(sorted(counts.values())), percentile)
    return np.array([any(counts[tag] <= limit for tag in own) for own in tagged])
