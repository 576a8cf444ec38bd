"""Tables that stand beside an experiment's: what choosing examples gives and needs, and how even each method is over the tasks.

Knows: which cells the indicators are read from, and how they are written down. Does not know: how an indicator is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from selectune import catalogue
from selectune.evaluation.dispersion import Dispersion
from selectune.evaluation.selectors import efficiency, feasibility, feasibility_ranks
from selectune.experiment import judging
from selectune.experiment.lines import EVERY_RECORD
from selectune.experiment.results import Row, Sheet


def indicators(sheet: Sheet, metric: str) -> list[str]:
    """Write what each selector gives for its size, and what it needs; nothing where the whole pool was not trained on.

    Args:
        metric: that the gain is read from.
    """
    rows = sorted((row for row in sheet.rows if row.outcome is not None), key=lambda row: -row.gain.mean)
    full = next((row for row in rows if row.line.name == EVERY_RECORD), None)
    if full is None or len(rows) < 2:
        return []
    needed = {row.line.name: feasibility(catalogue.create("examples", row.line.examples), row.cells[0].choose) for row in rows}
    ranks = feasibility_ranks(needed)
    lines = [
        "| selector | selected (SDF) | to the whole pool (PIR) | tokens read to choose | with gradients | models trained | hyper-parameters | "
        "bound to | simplicity | flexibility | feasibility |",
        "|---|" + "---|" * 10,
    ]
    for row in rows:
        name = row.line.name
        gives = efficiency(
            row.count("tokens"), full.count("tokens"), _score(row, metric), _score(full, metric), is_loss=metric == "loss"
        )
        need, rank, cost = needed[name], ranks[name], row.cells[0].choose
        bound = [what for what, is_bound in (("base", need.model_bound), ("pool", need.data_bound), ("target", need.needs_target),
                                             ("endpoint", need.asks_outside)) if is_bound]  # fmt: skip
        lines.append(
            f"| {name} | {gives.fraction:.1%} | {gives.ratio:.3f} | {cost.forward_tokens:,} | {cost.backward_tokens:,} | "
            f"{need.trained_models} | {need.hyper_parameters} | {', '.join(bound) or 'nothing'} | {rank.simplicity} | {rank.flexibility} | "
            f"{rank.feasibility} |"
        )
    explained = (
        "SDF: selected tokens over the pool's. PIR: score over that of the whole pool (of a loss: of the probabilities of a right token). "
        "The last three are ranks, 1 is best: of twice the models trained and the kinds of work, of what it is bound to, of both "
        "(arXiv 2406.14115)."
    )
    return [*lines, "", explained, ""]


def evenness(sheets: Sequence[Sheet], metrics: dict[str, list[str]]) -> list[str]:
    """Write each method's mean and spread over the tasks that are scored alike; nothing where fewer than two are.

    Args:
        sheets: of one kind and budget. metrics: task -> what is measured on it; the share of right items is what can be compared.
    """
    lines: list[str] = []
    for metric in sorted({one for names in metrics.values() for one in names} - {"loss"}):
        those = [sheet for sheet in sheets if metric in metrics[sheet.task] and any(row.cells for row in sheet.rows)]
        spreads = _spreads(those, metric) if len(those) > 1 else []
        if spreads:
            lines += [f"Over {len(those)} tasks, {metric.replace('_', ' ')}:", "",
                      "| method | mean | deviation | variation (CV) | mean x (1 - CV) |", "|---|---|---|---|---|"]  # fmt: skip
            for spread in sorted(spreads, key=lambda one: -one.mean):
                index = "–" if spread.index is None else f"{spread.index:.1%}"
                lines.append(
                    f"| {spread.benchmark} | {spread.mean:.1%} | {spread.deviation:.1%} | {spread.variation:.2f} | {index} |"
                )
            lines.append("")
    return lines


def _spreads(sheets: Sequence[Sheet], metric: str) -> list[Dispersion]:
    """Return the dispersion of every method that was run on all of the tasks."""
    scores: dict[str, dict[str, float]] = {}
    items: dict[str, int] = {}
    for sheet in sheets:
        items[sheet.task] = len(judging.find(sheet.base, metric).items)
        for row in sheet.rows:
            if row.cells:
                scores.setdefault(row.line.name, {})[sheet.task] = _score(row, metric)
    return [Dispersion(name, by, items) for name, by in scores.items() if by.keys() == items.keys()]


def _score(row: Row, metric: str) -> float:
    return fmean(judging.find(cell.benchmarks, metric).score for cell in row.cells)
