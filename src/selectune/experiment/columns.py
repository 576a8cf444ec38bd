"""The columns of an experiment's tables, for each kind of experiment.

Knows: what a row shows, and how. Does not know: which rows there are, or what is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from selectune.experiment import judging
from selectune.experiment.judging import Interval
from selectune.experiment.plan import Plan
from selectune.experiment.planting import IN_DOMAIN, NOISE
from selectune.experiment.results import Row, Sheet

EDGE = "(edge)"
"""Beside the lowest or highest of the learning rates that were tried."""


@dataclass(frozen=True)
class Column:
    """A column of a Markdown table."""

    title: str
    text: Callable[[Row], str]


def columns(sheet: Sheet, plan: Plan, budget_entries: int) -> list[Column]:
    """Return the columns of a table; ``budget_entries``: the budget in entries, 0 where it is of tokens."""
    task = plan.protocol.tasks[sheet.task]
    metrics = [metric for metric in task.metrics if metric != "loss"]
    examples = plan.protocol.axis == "examples"
    return [
        Column("method", lambda row: row.line.name),
        *(_chosen_records(sheet) if examples else [Column("entries", lambda row: entries(row, budget_entries))]),
        Column(f"gain ({unit(task.metrics[0])})", lambda row: shown(row.gain)),
        *([Column("development loss", lambda row: f"{fmean(_dev_loss(row)):.3f}")] if examples else []),
        Column("forgetting", lambda row: shown(row.forgetting)),
        Column("KL", lambda row: f"{row.mean('kl'):.3f}"),
        Column("same top token", lambda row: f"{row.mean('top1_agreement'):.1%}"),
        *(Column(metric, lambda row, metric=metric: _score(row, metric)) for metric in metrics),  # type: ignore[misc]
        Column("rank", lambda row: str(row.rank)),
        Column("choosing, s", lambda row: f"{fmean(cell.choose.seconds for cell in row.cells):.1f}"),
        Column("training, s", lambda row: f"{fmean(cell.train.seconds for cell in row.cells):.1f}"),
        *(
            [Column("tokens trained", lambda row: f"{fmean(c.train.backward_tokens for c in row.cells):,.0f}")]
            if examples
            else []
        ),
        Column("peak, GiB", lambda row: f"{fmean(cell.peak_memory_bytes for cell in row.cells) / 2**30:.2f}"),
        Column("PFLOP", lambda row: f"{fmean(cell.choose.flops + cell.train.flops for cell in row.cells) / 1e15:.3g}"),
        Column("learning rate", rate),
        Column("better than random on" if examples else "beats random on", lambda row: beats(sheet, row, plan)),
    ]


def _chosen_records(sheet: Sheet) -> list[Column]:
    """How much was chosen, and which share of each planted kind is in it."""
    planted = {kind for row in sheet.rows for cell in row.cells for kind in cell.kept}
    kinds = [kind for kind in (*NOISE, IN_DOMAIN) if kind in planted]
    return [
        Column("records", lambda row: f"{row.count('records'):,}"),
        Column("tokens", lambda row: f"{row.count('tokens'):,}"),
        *(Column(f"{kind} kept", lambda row, kind=kind: f"{row.kept(kind) or 0.0:.0%}") for kind in kinds),  # type: ignore[misc]
    ]


def entries(row: Row, budget: int) -> str:
    """Return the entries that trained, marked where they are not as many as the budget."""
    mark = "" if all(cell.exact for cell in row.cells) else " †" if row.entries <= budget else " ‡"
    return f"{row.entries:,}{mark}"


def _dev_loss(row: Row) -> list[float]:
    return [float(cell.grid[f"{cell.learning_rate:g}"]) for cell in row.cells]


def _score(row: Row, metric: str) -> str:
    return f"{fmean(judging.find(cell.benchmarks, metric).score for cell in row.cells):.1%}"


def rate(row: Row) -> str:
    """Return the learning rate, marked at the edge of its grid: a better one may lie outside."""
    found = ", ".join(sorted({f"{cell.learning_rate:g}" for cell in row.cells}))
    first, tried = row.cells[0], sorted(map(float, row.cells[0].grid))
    return f"{found} {EDGE}" if len(tried) > 1 and first.learning_rate in (tried[0], tried[-1]) else found


def beats(sheet: Sheet, row: Row, plan: Plan) -> str:
    """Say on which sides a row is better or worse than random; where it is neither, it cannot be told from it."""
    known = [on for on in (judging.GAIN, judging.FORGETTING) if row.line.name in sheet.against_random[on]]
    if not known:
        return "–"
    confidence, against = plan.protocol.confidence, {on: sheet.against_random[on][row.line.name] for on in known}
    won = [on for on in known if against[on].better(confidence)]
    lost = [on for on in known if against[on].interval.high < 0 and against[on].p_corrected < 1 - confidence]
    said = [how + ("both" if len(on) == 2 else on[0]) for how, on in (("", won), ("worse on ", lost)) if on]
    return ", ".join(said) or "neither"


def shown(found: Interval) -> str:
    """Write an interval."""
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def unit(metric: str) -> str:
    """Return what a gain is counted in."""
    return "nats per token of the right answer" if metric == "loss" else f"share of items right, {metric.replace('_', ' ')}"
