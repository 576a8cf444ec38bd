"""The cells of an experiment as tables: one for each kind, task and budget, a row for each method.

Knows: which cells belong to a row and what they are compared with. Does not know: how anything is written down.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

from selectune.experiment import judging
from selectune.experiment.judging import FORGETTING, GAIN, Comparison, Interval, Outcome
from selectune.experiment.lines import EVERY_RECORD, RANDOM, RANDOM_BLOCKS, MethodLine, of_blocks
from selectune.experiment.plan import Plan
from selectune.experiment.store import Cell, Measured
from selectune.run import Benchmark

NOTHING = Interval(0.0, 0.0, 0.0)


@dataclass
class Row:
    """A method in a table."""

    line: MethodLine
    all: list[Cell]
    """One for each seed, run or not."""
    outcome: Outcome | None = None
    gain: Interval = NOTHING
    forgetting: Interval = NOTHING
    rank: int = 0

    @property
    def cells(self) -> list[Cell]:
        """Those that were run and did not fail."""
        return [cell for cell in self.all if cell.failed is None]

    @property
    def missing(self) -> dict[int, str]:
        """Seed -> why there is no result."""
        return {cell.seed: cell.failed for cell in self.all if cell.failed is not None}

    @property
    def entries(self) -> int:
        return self.count("entries")

    def count(self, what: str) -> int:
        """Return the mean of what cells count: ``entries`` that trained, ``records`` or ``tokens`` that were chosen."""
        return round(fmean(getattr(cell, what) for cell in self.cells))

    def kept(self, kind: str) -> float | None:
        """Return the share kept of a kind of planted records; None where the pool has none."""
        found = [cell.kept[kind] for cell in self.cells if kind in cell.kept]
        return fmean(found) if found else None

    def mean(self, metric: str) -> float:
        """Return the mean of one of the measures of drift."""
        return fmean(next(one.score for one in cell.benchmarks if one.metric == metric) for cell in self.cells)

    def score(self, seed: int, on: str) -> float:
        """Return the gain with one seed, or the forgetting with its sign turned."""
        assert self.outcome is not None
        place = self.outcome.seeds.index(seed)
        return float(self.outcome.gain[place].mean() if on == GAIN else -self.outcome.forgetting[place].mean())


@dataclass
class Sheet:
    """A table."""

    table: str
    task: str
    budget: float
    rows: list[Row]
    base: list[Benchmark]
    control: dict[str, str] = field(default_factory=dict)
    """Method -> the random control of its kind."""
    against_random: dict[str, dict[str, Comparison]] = field(default_factory=lambda: {GAIN: {}, FORGETTING: {}})

    def outcome(self, name: str) -> Outcome | None:
        return next((row.outcome for row in self.rows if row.line.name == name), None)

    def same_kind(self, name: str, line: MethodLine) -> str:
        """Return whom a method is compared with: for random, the control of its own kind."""
        return RANDOM_BLOCKS if name == RANDOM and of_blocks(line) and self.outcome(RANDOM_BLOCKS) is not None else name


def sheets(plan: Plan) -> list[Sheet]:
    """Return every table of an experiment, as far as its cells have come."""
    found: dict[tuple[str, str, float], dict[str, Row]] = {}
    for slot in plan.slots():
        rows = found.setdefault((slot.table, slot.task, slot.budget), {})
        rows.setdefault(slot.line.name, Row(slot.line, [])).all.append(plan.cell(slot))
    return [_sheet(plan, *place, list(rows.values())) for place, rows in found.items()]


def _sheet(plan: Plan, table: str, task: str, budget: float, rows: list[Row]) -> Sheet:
    measured = plan.store.read(Measured, "measured", plan.measured_key(task))
    sheet = Sheet(table, task, budget, rows, measured.benchmarks if measured else [])
    confidence, metric = plan.protocol.confidence, plan.protocol.tasks[task].metrics[0]
    for row in rows:
        if row.cells and measured:
            row.outcome = judging.outcome_of(measured.benchmarks, {cell.seed: cell.benchmarks for cell in row.cells}, metric)
            row.gain = judging.interval([row.outcome.gain], confidence)
            row.forgetting = judging.interval([row.outcome.forgetting], confidence)
    for rank, row in enumerate(sorted((row for row in rows if row.outcome), key=lambda row: -row.gain.mean), start=1):
        row.rank = rank
    pairs = {}
    for row in rows:
        control = sheet.same_kind(RANDOM, row.line)
        ours, theirs = row.outcome, sheet.outcome(control)
        if ours is None or theirs is None or row.line.name in (RANDOM, RANDOM_BLOCKS, EVERY_RECORD):
            continue
        if row.entries <= next(other.entries for other in rows if other.line.name == control):
            pairs[row.line.name], sheet.control[row.line.name] = (ours, theirs), control
    for on in (GAIN, FORGETTING):
        if plan.protocol.axis == "examples":
            drawn = {name: judging.beside_draws([pair], on, confidence) for name, pair in pairs.items()}
            sheet.against_random[on] = {name: found for name, found in drawn.items() if found is not None}
        else:
            sheet.against_random[on] = judging.compare(pairs, on, confidence)
    return sheet
