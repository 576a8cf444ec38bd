"""A pool to choose from: records of several files, drawn by hash, with a known share of what should be left out and of what is looked for.

Knows: the keys of a task's ``pool``, and how its records are read, cleaned of the test's and drawn. Does not know: what is planted means
(``planting.py``), or how anything is chosen.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from pydantic import Field

from selectune.data.records import Record
from selectune.errors import UserError
from selectune.experiment.planting import GENERAL, IN_DOMAIN, OFF_DOMAIN, Account, plant
from selectune.recipe import DataRecipe, Positive, Section

Share = Annotated[float, Field(ge=0, le=0.5)]


class Source(Section):
    """Records of one kind."""

    train: str | list[str]
    """As ``data.train`` of a recipe."""
    shape: str = "auto"
    columns: dict[str, str] = Field(default_factory=dict)
    records: Positive
    """How many are drawn, by hash of their content and the seed."""

    def data(self) -> DataRecipe:
        """Return how they are read: without duplicates, and nothing held out."""
        return DataRecipe.model_validate(
            {"train": self.train, "shape": self.shape, "columns": self.columns, "dev_fraction": 0.0, "test_fraction": 0.0}
        )


class PlantedPool(Section):
    """What a task's methods choose from, instead of its training records alone."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """General records."""
    in_domain: Annotated[int, Field(ge=0)] = 0
    """Planted: so many of the task's own training records."""
    off_domain: list[Source] = Field(default_factory=list)
    """Planted: records of subjects that have nothing to do with the task."""
    wrong_answers: Share = 0.0
    """Planted: the share of general and in-domain records whose answers change places within their file."""
    exact_duplicates: Share = 0.0
    """Planted: so many copies, as a share of the general and in-domain records."""
    near_duplicates: Share = 0.0
    """Planted: copies with other words around the question and a few words of the answer gone."""
    longest: Positive | None = None
    """Characters of question and answer; longer records are left out. Left out: any."""
    seed: int = 0


def build(pool: PlantedPool, own: list[Record], texts: dict[str, list[str]]) -> tuple[list[Record], Account]:
    """Draw a pool and plant what it says.

    Args:
        own: the task's training records. texts: name -> questions that must not be in the pool.

    Raises:
        UserError: a file that cannot be read, or that has fewer records than are asked for.
    """
    from selectune.data import prepare

    seen: set[str] = set()
    parts: dict[str, list[Record]] = {GENERAL: [], IN_DOMAIN: [], OFF_DOMAIN: []}
    for kind, sources in ((GENERAL, pool.sources), (OFF_DOMAIN, pool.off_domain)):
        for source in sources:
            read = prepare(source.data(), texts, seed=pool.seed).train
            parts[kind] += _drawn(pool, read, source.records, source.train, seen)
    parts[IN_DOMAIN] = _drawn(pool, own, pool.in_domain, "the task's own training records", seen)
    try:
        return plant(parts, pool.wrong_answers, pool.exact_duplicates, pool.near_duplicates, pool.seed)
    except ValueError as error:
        raise UserError(str(error), field="pool") from None


def _drawn(pool: PlantedPool, records: list[Record], count: int, name: Any, seen: set[str]) -> list[Record]:
    fit = [record for record in records if record.key not in seen and (pool.longest is None or _size(record) <= pool.longest)]
    if len(fit) < count:
        raise UserError(f"{count:,} records are asked for and {len(fit):,} can be used", file=str(name), field="pool")
    found = sorted(fit, key=lambda record: hashlib.sha256(f"{pool.seed}/{record.key}".encode()).digest())[:count]
    seen.update(record.key for record in found)
    return found


def _size(record: Record) -> int:
    return len(record.text) + sum(len(message.content) for message in record.messages)
