"""What every method of this axis has in common.

Knows: a budget in records or in trained tokens, how it is filled in a given order, and what a choice is. Does not know: any method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from selectune.catalogue import Method
from selectune.data.records import Record
from selectune.errors import UserError
from selectune.examples.pool import Pool

Array = np.ndarray


@dataclass
class Choice:
    """The chosen records of a pool."""

    places: Array
    """``(n,)`` int64, in the order in which they were chosen."""
    signals: dict[str, Array] = field(default_factory=dict)
    """What the choice was made from, ``(records,)`` each."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Of single records, where a method has more to say than its signals."""
    weights: Array | None = None
    """Of the losses of the chosen records in training, ``(n,)``, on average 1, where a method weighs them; 0 leaves a record out."""
    records: Sequence[Record] | None = None
    """The pool as it trains, ``(records,)``, where a method changes records; left out: as it is."""

    def as_they_train(self, pool: Sequence[Record]) -> dict[int, Record]:
        """Return the records that train by their place in the pool, each with its weight, in the order in which they were chosen."""
        places = self.places.tolist()
        weights = [1.0] * len(places) if self.weights is None else self.weights.tolist()
        records = pool if self.records is None else self.records
        return {
            place: records[place] if weight == 1 else replace(records[place], weight=weight)
            for place, weight in zip(places, weights, strict=True)
            if weight > 0
        }


class ExampleMethod(Method, ABC):
    """An answer to: which examples train?"""

    axis: ClassVar[str] = "examples"
    needs_target: ClassVar[bool] = False
    """Whether it asks what the target looks like."""
    changes: ClassVar[bool] = False
    """Whether it changes records, so that it has something to do where all of them train."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the pool that trains."""
    count: Annotated[int, Field(gt=0)] | None = None
    """How many records (or tokens) train, instead of ``fraction``."""
    by: Literal["records", "tokens"] = "records"
    """What the budget is counted in: records, or the tokens of their responses."""

    @abstractmethod
    def choose(self, pool: Pool) -> Choice:
        """Return the choice; the pool is larger than the budget and not empty."""

    def select(self, pool: Pool) -> Choice:
        """Choose records from a pool.

        Raises:
            UserError: an empty pool, a budget larger than the pool, a target that is missing.
        """
        if not len(pool):
            raise UserError("there are no records to choose from", field="data.train")
        if self.needs_target and not pool.target:
            raise UserError(f"'{self.name}' chooses toward a target, and there are no target records", field="examples",
                            expected="records of the target", mend="give --target FILE, or data.target in the recipe")  # fmt: skip
        if self.budget(pool) >= self.size(pool) and not self.changes:
            return Choice(np.arange(len(pool), dtype=np.int64))
        choice = self.choose(pool)
        choice.places = np.asarray(choice.places, dtype=np.int64)
        return choice

    def size(self, pool: Pool) -> int:
        """Return the size of the whole pool, in what the budget is counted in."""
        return len(pool) if self.by == "records" else int(pool.tokens.sum())

    def budget(self, pool: Pool) -> int:
        """Return the budget, in what it is counted in.

        Raises:
            UserError: more than the pool has.
        """
        there = self.size(pool)
        if self.count is not None and self.count > there:
            raise UserError(f"{self.count:,} {self.by} are asked for and the pool has {there:,}", field="examples.count",
                            expected=f"at most {there:,}")  # fmt: skip
        return self.count if self.count is not None else max(1, round(self.fraction * there))

    def fill(self, pool: Pool, order: Sequence[int] | Array, trains: Pool | None = None) -> Array:
        """Return the records that fill the budget when they are taken in an order: exactly so many; or, by tokens, each that still fits.

        By tokens, a record of which nothing trains is never taken.

        Args:
            trains: the pool as it trains, where a method changes records: the budget is one of the pool as it was, what fills it is what trains.
        """
        budget, order = self.budget(pool), np.asarray(order, dtype=np.int64)
        if self.by == "records":
            return order[:budget]
        kept, left, sizes = [], budget, (trains or pool).tokens
        for place in order.tolist():
            if 0 < sizes[place] <= left:
                kept.append(place)
                left -= int(sizes[place])
        return np.array(kept, dtype=np.int64)

    def needed(self, pool: Pool) -> int:
        """Return how many records a sampler must put in order: the budget, or all where tokens decide which still fit."""
        return self.budget(pool) if self.by == "records" else len(pool)

    def about(self, pool: Pool) -> int:
        """Return about how many records the budget will hold, for samplers that must know before they choose."""
        if self.by == "records":
            return self.budget(pool)
        return min(len(pool), max(1, round(self.budget(pool) / max(float(pool.tokens.mean()), 1e-9))))


def something_trains(pool: Pool, which: str = "") -> None:
    """Check that there is something to learn in a pool.

    Args:
        which: records, in words.

    Raises:
        UserError: there is nothing, as the base reads its records.
    """
    if not pool.tokens.any():
        raise UserError(f"none of the {which}records has a response to learn from", field="examples",
                        mend="give records with responses, or a larger data.max_length")  # fmt: skip


def tell_unscored(pool: Pool, scores: Array) -> None:
    """Note how many records :func:`ranked` puts last because their score, ``(records,)`` float, is not a number."""
    if missing := int((~np.isfinite(scores)).sum()):
        pool.notes.append(
            f"{missing:,} record{'s have' if missing > 1 else ' has'} no finite score and come{'' if missing > 1 else 's'} last"
        )


def ranked(pool: Pool, scores: Array, highest_first: bool = True) -> Array:
    """Return all places from the best score to the worst; ties by content; not-a-number last.

    Args:
        scores: ``(records,)`` float.
    """
    signed = np.where(np.isfinite(scores), -scores if highest_first else scores, np.inf)
    by_content = pool.order
    return by_content[np.argsort(signed[by_content], kind="stable")]


class Ranked(ExampleMethod, ABC):
    """A method that scores every record by itself and takes the best."""

    keep: Literal["highest", "lowest"] = "highest"
    """Which end of the score trains."""

    @abstractmethod
    def score(self, pool: Pool) -> dict[str, Array]:
        """Return signals, the deciding one first."""

    def choose(self, pool: Pool) -> Choice:
        signals = self.score(pool)
        decided = next(iter(signals.values()))
        tell_unscored(pool, decided)
        return Choice(self.fill(pool, ranked(pool, decided, self.keep == "highest")), signals)
