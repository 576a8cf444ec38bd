"""How even is what a model knows? A benchmark's score over its sub-domains: the mean, and how far they spread.

Knows: which sub-domains a benchmark has (the tasks that it is made of, or its areas), that small ones are put together, the coefficient of
variation and the index made of it (EnviroExam, 2024, arXiv 2405.11265; its gap between no examples and five is not computed). Does not know: how
anything was scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from selectune.run import Benchmark

LEAST = 10
"""Items that a sub-domain must have: fewer spread by chance alone."""
OTHERS = "others"


@dataclass(frozen=True)
class Dispersion:
    """The scores of one benchmark over its sub-domains."""

    benchmark: str
    scores: dict[str, float]
    items: dict[str, int]

    @property
    def mean(self) -> float:
        """Of the sub-domains, each counted once."""
        return float(np.mean(list(self.scores.values())))

    @property
    def deviation(self) -> float:
        """Standard deviation of the sub-domains' scores (of the population)."""
        return float(np.std(list(self.scores.values())))

    @property
    def by_chance(self) -> float:
        """The deviation that right-or-wrong items would show by chance, were all sub-domains equally hard."""
        mean = min(max(self.mean, 0.0), 1.0)
        return math.sqrt(mean * (1 - mean) * float(np.mean([1 / count for count in self.items.values()])))

    @property
    def variation(self) -> float:
        """The coefficient of variation, deviation over mean: 0 is even knowledge; not a number where the mean is zero."""
        return self.deviation / self.mean if self.mean else math.nan

    @property
    def index(self) -> float | None:
        """``mean * (1 - variation)``; None where the variation is above 1 and the mean says little."""
        return self.mean * (1 - self.variation) if self.variation <= 1 else None


def dispersion(benchmark: str, values: Mapping[str, Sequence[float]], least: int = LEAST) -> Dispersion | None:
    """Return how a benchmark's score spreads; None with fewer than two sub-domains.

    Args:
        values: sub-domain -> its items' values, higher is better. least: sub-domains of fewer items are put together as :data:`OTHERS`, which is
            left out if it is still too small.
    """
    whole = {name: list(inside) for name, inside in values.items() if len(inside) >= least}
    rest = [value for inside in values.values() if len(inside) < least for value in inside]
    if len(rest) >= least:
        whole[OTHERS] = rest
    if len(whole) < 2:
        return None
    means = {name: float(np.mean(inside)) for name, inside in whole.items()}
    return Dispersion(benchmark, means, {name: len(inside) for name, inside in whole.items()})


def dispersions(benchmarks: Sequence[Benchmark], least: int = LEAST) -> list[Dispersion]:
    """Return the dispersion of every benchmark that has sub-domains and is better when higher."""
    found = []
    for one in benchmarks:
        if one.higher_is_better and "/" not in one.name:
            spread = dispersion(one.name, _by_task(one) or _by_area(one, benchmarks), least)
            if spread is not None:
                found.append(spread)
    return found


def _by_task(benchmark: Benchmark) -> dict[str, list[float]]:
    """Values by the task that an item's id begins with, where the benchmark is made of several."""
    tasks: list[str] = benchmark.settings.get("tasks", [])
    if len(tasks) < 2:
        return {}
    return {task: [item.value for item in benchmark.items if item.id.startswith(f"{task}-")] for task in tasks}


def _by_area(benchmark: Benchmark, benchmarks: Sequence[Benchmark]) -> dict[str, list[float]]:
    """Values by area, where areas stand beside the benchmark under names with a slash, in the same metric."""
    areas = (one for one in benchmarks if one.name.startswith(f"{benchmark.name}/") and one.metric == benchmark.metric)
    return {one.name.partition("/")[2]: [item.value for item in one.items] for one in areas}
