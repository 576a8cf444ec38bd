"""How numbers, states and verdicts are written, on a page and in a terminal alike.

Knows: the unit of a metric, the tone of a verdict, how far a run has come. Does not know: pages, tables or colours.
"""

from __future__ import annotations

from typing import Any

from pydantic import RootModel

from selectune.run import STAGES, Difference, Run, Sample

NATS = ("answer_nll", "cross_entropy", "kl")
"""Metrics in nats per token; all others are shares, written in per cent and their differences in points."""
TONES = {
    "gained": "good",
    "nothing lost": "good",
    "lost": "bad",
    "too few items to say": "warn",
    "no clear gain": "warn",
}
ROLES = {"target": "Target", "general": "General ability", "forgetting": "Drift from the base"}


class Samples(RootModel[list[Sample]]):
    """The contents of samples.json."""


def number(difference: Difference, value: float, signed: bool = False) -> str:
    """Write a value in its metric's unit: a share in per cent, nats as they are; signed values without the unit."""
    if difference.metric in NATS:
        return f"{value:{'+' if signed else ''}.3f}"
    return f"{value * 100:+.1f}" if signed else f"{value * 100:.1f} %"


def unit(difference: Difference) -> str:
    """Return the unit of a difference."""
    return "nats per token" if difference.metric in NATS else "points"


def better(difference: Difference) -> float:
    """Return the difference with its sign turned so that positive is better."""
    return difference.difference if difference.higher_is_better else -difference.difference


def metric(difference: Difference) -> str:
    """Return the metric's name in words, with its direction where that is not the usual one."""
    return difference.metric.replace("_", " ") + ("" if difference.higher_is_better else ", lower is better")


def method(described: Any) -> str:
    """Write a method as a recipe names it: ``fisher_blocks (k = 8, examples = 64)``."""
    if isinstance(described, str):
        return described
    rest = ", ".join(f"{key} = {value}" for key, value in described.items() if key != "method" and value is not None)
    return f"{described['method']} ({rest})" if rest else str(described["method"])


def duration(seconds: float) -> str:
    """Write a time: ``8.3 s``, ``14 min 21 s``, ``2 h 05 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes} min {left:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Write a number of bytes: ``512 B``, ``67.5 MiB``, ``6.44 GiB``."""
    for name, factor, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if count >= factor:
            return f"{count / factor:.{digits}f} {name}"
    return f"{count:.0f} B"


def missing_stages(run: Run) -> list[str]:
    """Return the stages that have not finished, in the order of the chain; the report's own does not count."""
    return [stage for stage in STAGES if stage != "report" and not run.finished(stage)]


def state_of(run: Run) -> str:
    """Say how far a run has come."""
    missing = missing_stages(run)
    return f"can be resumed at '{missing[0]}'" if missing else "finished"
