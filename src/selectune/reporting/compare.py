"""One page for several runs: the gain-against-forgetting front, every difference, costs, and where the recipes differ.

Knows: run folders. Warns where runs are not comparable: another base, or other test items.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from selectune.errors import UserError
from selectune.reporting import charts, wording
from selectune.reporting.report import environment
from selectune.run import Evaluation, Run, Scores, Verdict, write_atomically


def write_comparison(runs: list[Run], path: Path) -> Path:
    """Write the page.

    Raises:
        UserError: a run is not finished.
    """
    rows = [_row(run) for run in runs]
    names = list(dict.fromkeys(name for row in rows for name in row["differences"]))
    page = environment().get_template("comparison.html").render(
        rows=rows,
        benchmarks=[name for name in names if "/" not in name or name.startswith("forgetting/")],
        picture=_front(rows),
        settings=_settings(runs),
        notes=_notes(runs),
    )  # fmt: skip
    write_atomically(path, page)
    return path


def _front(rows: list[dict[str, Any]]) -> Markup:
    """Draw gain at the target against the rise of cross-entropy on general text; runs measured on other metrics are left out."""
    pairs = [(row["name"], row["differences"].get("target"), row["differences"].get("forgetting/cross_entropy")) for row in rows]
    known = [(name, gain, drift) for name, gain, drift in pairs if gain is not None and drift is not None]
    metric = known[0][1].metric if known else ""
    spots = []
    for name, gain, drift in known:
        if gain.metric == metric:
            low, high = sorted((gain.low, gain.high)) if gain.higher_is_better else (-gain.high, -gain.low)
            spots.append(charts.Spot(name, (drift.low, drift.difference, drift.high), (low, wording.better(gain), high)))
    if not spots:
        return Markup()
    nats = metric in wording.NATS
    up = f"gain at the target ({metric.replace('_', ' ')}, {'nats per token' if nats else 'points'})"
    return charts.scatter(spots, "rise of cross-entropy on general text (nats per token)", up, 1 if nats else 100)


def _row(run: Run) -> dict[str, Any]:
    if not run.has("verdict.json"):
        raise UserError("is not finished", file=run.folder, mend=f"selectune resume {run.folder}")
    verdict, scores = run.read("verdict.json", Verdict), run.read("scores.json", Scores)
    costs = {cost.stage: cost for cost in run.costs()}
    return {
        "name": run.name,
        "weights": wording.method(scores.method),
        "form": wording.method(scores.form),
        "trained": scores.trained_parameters,
        "differences": {difference.benchmark: difference for difference in verdict.differences},
        "seconds": costs["choose"].seconds + costs["train"].seconds,
        "memory": costs["train"].peak_memory_bytes,
        "retained": verdict.retained,
    }


def _settings(runs: list[Run]) -> list[tuple[str, list[str]]]:
    flat = [_flatten(run.recipe.model_dump(mode="json")) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = [(key, [str(values.get(key, "")) for values in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _notes(runs: list[Run]) -> list[str]:
    notes = []
    if len({run.recipe.base for run in runs}) > 1:
        notes.append("These runs have different bases: changes are comparable, scores are not.")
    items = set()
    for run in runs:
        target = next((b for b in run.read("evaluation.json", Evaluation).benchmarks if b.name == "target"), None)
        items.add(tuple(item.id for item in target.items) if target else ())
    if len(items) > 1:
        notes.append("These runs were measured on different target items: their gains are not comparable.")
    return notes
