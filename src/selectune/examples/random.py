"""Records at random, by content and seed: what every other choice must beat."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from selectune.examples.method import Choice, ExampleMethod, ranked
from selectune.examples.pool import Pool


class RandomExamples(ExampleMethod):
    """Records at random."""

    name: ClassVar[str] = "random"
    family: ClassVar[str] = "controls"
    summary: ClassVar[str] = "Control: records at random, by the run's seed."
    paper: ClassVar[str] = "Rethinking Data Selection at Scale: Random Selection is Almost All You Need, 2024, arXiv 2410.09335"

    def choose(self, pool: Pool) -> Choice:
        return Choice(self.fill(pool, ranked(pool, pool.uniform("random"))))


class AllExamples(ExampleMethod):
    """Every record."""

    name: ClassVar[str] = "all"
    family: ClassVar[str] = "controls"
    summary: ClassVar[str] = "Every record of the pool."

    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the pool that trains."""

    def choose(self, pool: Pool) -> Choice:
        return Choice(self.fill(pool, pool.order))
