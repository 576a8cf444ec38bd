"""Several answers to one question: what methods that choose among them have in common.

Knows: which records answer the same question, and that a budget is a share of what is left of them. Does not know: how answers are compared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated

import numpy as np
from pydantic import Field

from selectune.examples.method import Array, Choice, ExampleMethod
from selectune.examples.pool import Pool


class AmongAnswers(ExampleMethod, ABC):
    """Of several answers to a question, those that suit the base; even where the budget would hold all of them."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the answers that suit the base; by tokens: of the tokens of the whole pool."""

    @abstractmethod
    def suited(self, pool: Pool) -> tuple[Array, dict[str, Array]]:
        """Return the places of the answers that suit the base, best first, and signals."""

    def select(self, pool: Pool) -> Choice:
        if not len(pool):
            return super().select(pool)
        self.budget(pool)
        return self.choose(pool)

    def choose(self, pool: Pool) -> Choice:
        places, signals = self.suited(pool)
        if self.by == "tokens":
            return Choice(self.fill(pool, places), signals)
        wanted = self.count if self.count is not None else max(1, round(self.fraction * len(places)))
        if wanted > len(places):
            pool.notes.append(f"{wanted:,} records are asked for; only {len(places):,} answers suit the base")
        return Choice(places[:wanted], signals)


def by_question(pool: Pool) -> dict[tuple[str, ...], list[int]]:
    """Return the places of the answers to each question, by content; a text without a question is one by itself, and a question with other choices is
    another question."""
    found: dict[tuple[str, ...], list[int]] = {}
    for place in pool.order.tolist():
        record = pool.records[place]
        asked = (*(message.content for message in record.prompt), *record.choices)
        found.setdefault(asked or (pool.keys[place],), []).append(place)
    return found


def one_each(pool: Pool, misfit: Array) -> Array:
    """Return the place of each question's answer of least misfit, the best fit first; ties to the shorter answer, then by content."""
    rank = np.empty(len(pool), dtype=np.int64)
    rank[pool.order] = np.arange(len(pool))
    last = np.where(np.isfinite(misfit), misfit, np.inf)
    best = [
        min(places, key=lambda place: (last[place], pool.tokens[place], rank[place])) for places in by_question(pool).values()
    ]
    return np.array(sorted(best, key=lambda place: (last[place], pool.tokens[place], rank[place])), dtype=np.int64)
