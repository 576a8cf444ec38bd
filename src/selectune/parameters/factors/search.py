"""Searches over choices of weights: each candidate is tried once, from the same weights, in the same order of records.

Knows: what a trial of a selection is worth (held-out loss, and what it costs on general conversations), and how candidates are found:
greedily, by evolution, down a tree. Does not know: what a candidate stands for.

A value is higher where a candidate is better. Where a budget of trials is used up, a search returns the best that it has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selectune.parameters.factors.gradients import first
from selectune.parameters.factors.trial import Diverged, loss_on, trial
from selectune.parameters.selection import Selection
from selectune.progress import CONSOLE

if TYPE_CHECKING:
    from selectune.data import Record
    from selectune.parameters.method import Context

Key = TypeVar("Key", bound=Hashable)
Code = tuple[int, ...]


class Exhausted(Exception):
    """The budget of trials is used up."""


class Table(Generic[Key]):
    """Values of candidates, each measured once; a context that shows how far it is and how long it will take.

    Args:
        measure: what a candidate is worth. most: candidates that may be measured. expected: so many are, as far as is known.
    """

    def __init__(
        self, measure: Callable[[Key], float], *, most: int | None = None, expected: int | None = None, quiet: bool = True
    ) -> None:
        self.measure, self.most = measure, most
        self.values: dict[Key, float] = {}
        """In the order in which they were measured."""
        columns = (TextColumn("trying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=CONSOLE, transient=True, disable=quiet)
        totals = [number for number in (expected, most) if number is not None]
        self._task = self._bar.add_task("trying", total=min(totals) if totals else None)

    def __call__(self, key: Key) -> float:
        """Return a candidate's value.

        Raises:
            Exhausted: it is unknown and the budget is used up.
        """
        if key not in self.values:
            if self.most is not None and len(self.values) >= self.most:
                raise Exhausted
            self.values[key] = self.measure(key)
            self._bar.advance(self._task)
        return self.values[key]

    def best(self) -> Key:
        """Return the best candidate measured, the first among equals."""
        return max(self.values, key=lambda key: self.values[key])

    def __enter__(self) -> Table[Key]:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


@dataclass
class Trials:
    """What selections are worth: trained for a few steps, measured on records held out; nats per response token below the base.

    With one fold the development records are held out (a fifth of the training records where there are none); with more, each fold in
    turn, by hash of the records' content.
    """

    context: Context
    steps: int
    learning_rate: float
    examples: int
    """Training records used, the first by hash of their content."""
    folds: int = 1
    batch: int = 2
    retention: float = 0.0
    """How much a rise of the loss on general conversations counts against the gain."""
    optimiser: str = "adamw"

    @cached_property
    def splits(self) -> list[tuple[list[Record], list[Record]]]:
        """Records to train and to measure on, fold by fold."""
        records = first(self.context.train, self.examples)
        self.context.examples_scored = max(self.context.examples_scored, len(records))
        if self.folds > 1 and len(records) > 1:
            count = min(self.folds, len(records))
            return [([r for i, r in enumerate(records) if i % count != fold], records[fold::count]) for fold in range(count)]
        if self.context.dev:
            return [(records, first(self.context.dev, self.examples))]
        held = max(1, len(records) // 5)
        return [(records[held:] or records, records[:held])]

    @cached_property
    def general(self) -> list[Record]:
        """General conversations, where they count."""
        return self.context.general if self.retention else []

    @cached_property
    def base(self) -> list[float]:
        """The base's loss on each fold, and last on general conversations."""
        return [loss_on(self.context, held) for _, held in self.splits] + [loss_on(self.context, r) for r in [self.general] if r]

    def __call__(self, selection: Selection) -> float:
        """Return what a selection gains in a short training, every time from the base and in the same order; nothing chosen gains 0,
        and what diverges minus infinity."""
        if not selection.parts:
            return 0.0
        gains = []
        for (records, held), before in zip(self.splits, self.base, strict=False):
            try:
                tried = trial(self.context, selection, records=records, steps=self.steps, learning_rate=self.learning_rate,
                              batch=self.batch, optimiser=self.optimiser)  # fmt: skip
            except Diverged:
                return -math.inf
            gain = before - loss_on(self.context, held, tried.model)
            if self.general:
                gain -= self.retention * max(loss_on(self.context, self.general, tried.model) - self.base[-1], 0.0)
            gains.append(gain)
        mean = sum(gains) / len(gains)
        return mean if math.isfinite(mean) else -math.inf


def greedy(
    units: Sequence[int],
    value: Callable[[Code], float],
    *,
    backward: bool = False,
    slack: float = 0.0,
    rule: Literal["gain", "best"] = "best",
    most: int | None = None,
) -> Code:
    """Add (or take away) the best unit, one at a time, and return the set found, sorted; the best one seen, where the trials run out.

    Args:
        rule: ``gain``: stop when the best step gains no more than ``slack``; ``best``: go on while the value is no more than ``slack`` below
            the best seen, and return the best seen. most: units in the set, forward.
    """
    known: dict[Code, float] = {}

    def measured(code: Code) -> float:
        known[code] = value(code)
        return known[code]

    chosen: Code = tuple(sorted(units)) if backward else ()
    try:
        best, seen = chosen, measured(chosen)
        now = seen
        while chosen if backward else len(chosen) < min(len(units), most or len(units)):
            steps = [tuple(u for u in chosen if u != unit) for unit in chosen] if backward else [
                tuple(sorted((*chosen, unit))) for unit in units if unit not in chosen
            ]  # fmt: skip
            candidate = max(steps, key=lambda step: (measured(step), [-unit for unit in step]))
            reached = known[candidate]
            if rule == "gain" and not reached - now > slack:
                break
            if reached > seen:
                best, seen = candidate, reached
            if rule == "best" and reached < seen - slack:
                break
            chosen, now = candidate, reached
    except Exhausted:
        return max(known, key=lambda code: (known[code], [-unit for unit in code]), default=chosen)
    return best


def evolve(
    places: int,
    options: int,
    value: Callable[[Code], float],
    generator: torch.Generator,
    *,
    population: int = 20,
    generations: int = 15,
    parents: int = 8,
    mutation: float = 0.1,
) -> None:
    """Search codes of ``places`` digits below ``options``; what was found is in the table behind ``value``.

    Each generation the best are recombined (each digit from one of two of them), digits change now and then, and until the child is a new
    one; the children join, and the worst leave.
    """

    def random(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    seen: set[Code] = set()
    living: list[Code] = []
    everything = options**places

    def meet(code: Code) -> None:
        value(code)
        seen.add(code)
        living.append(code)

    try:
        while len(living) < min(population, everything):
            code = tuple(random(options) for _ in range(places))
            if code not in seen:
                meet(code)
        for _ in range(generations):
            best = sorted(living, key=value, reverse=True)[:parents]
            for _ in range(min(len(best), everything - len(seen))):
                mother, father = best[random(len(best))], best[random(len(best))]
                child = [(mother, father)[random(2)][place] for place in range(places)]
                chances = torch.rand(places, generator=generator).tolist()
                child = [random(options) if chance < mutation else digit for digit, chance in zip(child, chances, strict=True)]
                while tuple(child) in seen:  # a known child teaches nothing
                    child[random(places)] = random(options)
                meet(tuple(child))
            living = sorted(living, key=value, reverse=True)[:population]
    except Exhausted:
        return


def distant(values: dict[Code, float], options: int, count: int, least: float) -> list[Code]:
    """Return the best codes, the best first, whose one-hot codes have pairwise cosine distances of at least so much.

    The cosine of two one-hot codes is the share of places at which they agree.
    """
    kept: list[Code] = []
    for code in sorted(values, key=lambda key: (-values[key], key)):
        away = all(1 - sum(a == b for a, b in zip(code, other, strict=True)) / len(code) >= least - 1e-12 for other in kept)
        if away:
            kept.append(code)
        if len(kept) == count:
            break
    return kept


def descend(root: Key, children: Callable[[Key], Sequence[Key]], value: Callable[[Key], float]) -> Iterator[Key]:
    """Yield the way down a tree: from each node to its best child, the first among equals."""
    node = root
    while below := children(node):
        best, seen = below[0], -math.inf
        for child in below:
            try:
                reached = value(child)
            except Exhausted:
                return
            if reached > seen:
                best, seen = child, reached
        node = best
        yield node
