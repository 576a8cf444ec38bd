"""The report of a run: one HTML file, no network, verdict first.

Knows: the run folder's files and how they are laid out for a person; what is not there yet is said so.
Does not know: how anything in them was computed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from pydantic import BaseModel

from selectune import __version__
from selectune.reporting import charts, wording
from selectune.reporting.examples import examples_of
from selectune.reporting.wording import NATS, ROLES, Samples
from selectune.run import DataSummary, Difference, Evaluation, Item, Run, Scores, Verdict, write_atomically

Model = TypeVar("Model", bound=BaseModel)


def environment() -> Environment:
    """Return the templates' environment: everything is escaped but the pictures, which escape their own texts."""
    made = Environment(loader=PackageLoader("selectune.reporting"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.globals.update(charts=charts, version=__version__, tones=wording.TONES, unit=wording.unit, better=wording.better)
    made.filters.update(duration=wording.duration, size=wording.size, method=wording.method, metric=wording.metric,
                        count="{:,}".format, plain=lambda name: name.replace("_", " "))  # fmt: skip
    made.globals["number"] = lambda *values: wording.number(*values).replace("-", "\u2212")
    return made


def write_report(run: Run) -> Path:
    """Write ``report.html`` into the run folder, from its files alone, and return its path.

    Raises:
        UserError: a file of the run cannot be read.
    """
    verdict = _read(run, "verdict.json", Verdict)
    before, after = _read(run, "base_evaluation.json", Evaluation), _read(run, "evaluation.json", Evaluation)
    scores = _read(run, "scores.json", Scores)
    samples = _read(run, "samples.json", Samples)
    metrics = _metrics(run)
    training = _values(run, "training.json")
    page = environment().get_template("report.html").render(
        run=run,
        recipe=run.recipe,
        recipe_text=run.path("recipe.yaml").read_text(encoding="utf-8"),
        missing=wording.missing_stages(run),
        verdict=verdict,
        rows={row.benchmark: row for row in verdict.differences} if verdict else {},
        groups=forest(verdict) if verdict else [],
        samples=samples.root if samples else None,
        base=before,
        flips=_flips(before, after) if before and after else None,
        spreads=spreads(before, after),
        examples=examples_of(run),
        curves=_curves(metrics, training),
        training=training,
        last=next((line for line in reversed(metrics) if "tokens_per_second" in line), {}),
        scores=scores,
        finish=_values(run, "finish.json"),
        blocks=_blocks(scores) if scores and scores.blocks else None,
        costs=run.costs(),
        data=_read(run, "data.json", DataSummary),
        machine=_values(run, "environment.json"),
        origin=_values(run, "specialist/selectune.json"),
    )  # fmt: skip
    write_atomically(run.path("report.html"), page)
    return run.path("report.html")


@dataclass(frozen=True)
class Group:
    """Differences that are read on one scale."""

    title: str
    axis: Markup
    rows: list[tuple[Difference, Markup]]


def forest(verdict: Verdict) -> list[Group]:
    """Group a verdict's differences by role and unit, each with its interval as a picture; the points of target and general
    benchmarks share one scale."""
    widest = {
        key: max((max(abs(row.low), abs(row.high)) for row in rows), default=0.0) * 1.08 or 1.0
        for key, rows in _grouped(verdict, _scale).items()
    }
    groups = []
    for (role, nats), rows in _grouped(verdict, lambda row: (row.role, row.metric in NATS)).items():
        scale = widest[_scale(rows[0])]
        unit = "change in nats per token" if nats else "change in points"
        limit = -verdict.tolerance if role == "general" and not nats else None
        pictures = [(row, charts.interval(row.low, row.difference, row.high, scale, _tone(row), limit)) for row in rows]
        groups.append(Group(f"{ROLES[role]}: {unit}", charts.axis(scale, 1 if nats else 100), pictures))
    return groups


def spreads(before: Evaluation | None, after: Evaluation | None) -> list[tuple[Any, Any]]:
    """Return how evenly each benchmark with sub-domains is known, before and after (:class:`selectune.evaluation.dispersion.Dispersion`)."""
    if before is None or after is None:
        return []
    from selectune.evaluation.dispersion import dispersions

    later = {one.benchmark: one for one in dispersions(after.benchmarks)}
    return [(one, later[one.benchmark]) for one in dispersions(before.benchmarks) if one.benchmark in later]


def _scale(row: Difference) -> tuple[str, ...]:
    """Name the scale a difference is drawn on: target and general benchmarks in points are read against each other."""
    if row.metric in NATS or row.role == "forgetting":
        return row.role, "nats" if row.metric in NATS else "points"
    return ("points",)


def _grouped(verdict: Verdict, key: Any) -> dict[Any, list[Difference]]:
    groups: dict[Any, list[Difference]] = {}
    for row in sorted(verdict.differences, key=lambda row: list(ROLES).index(row.role)):
        groups.setdefault(key(row), []).append(row)
    return groups


def _tone(row: Difference) -> str:
    if row.low <= 0 <= row.high:
        return "plain"
    return "good" if wording.better(row) > 0 else "bad"


def _read(run: Run, file: str, kind: type[Model]) -> Model | None:
    return run.read(file, kind) if run.has(file) else None


def _values(run: Run, file: str) -> dict[str, Any]:
    return json.loads(run.path(file).read_text(encoding="utf-8")) if run.has(file) else {}


def _metrics(run: Run) -> list[dict[str, Any]]:
    """Return the logged steps; a line that a killed run left half-written is passed over."""
    lines = []
    for text in run.path("metrics.jsonl").read_text(encoding="utf-8").splitlines() if run.has("metrics.jsonl") else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _curves(metrics: list[dict[str, Any]], training: dict[str, Any]) -> Markup:
    series = {name: [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
              for name, key in (("training loss", "loss"), ("development loss", "eval_loss"))}  # fmt: skip
    best = (training["best_step"], "kept") if training.get("best_step") else None
    return charts.lines(series, "Loss", "step", "nats per response token", best)


def _blocks(scores: Scores) -> Markup:
    return charts.bars(
        [block.score for block in scores.blocks],
        [block.trained for block in scores.blocks],
        "What was trained, block by block", "block", "score", ("trained", "frozen"),
    )  # fmt: skip


@dataclass(frozen=True)
class Flips:
    """The items of one benchmark whose answers became right, and those that became wrong."""

    name: str
    right: list[tuple[Item, Item]]
    wrong: list[tuple[Item, Item]]


def _flips(before: Evaluation, after: Evaluation) -> list[Flips]:
    """Compare item by item; areas within a benchmark and metrics that are not right-or-wrong are left out."""
    found = []
    others = {benchmark.name: benchmark for benchmark in after.benchmarks}
    for first in before.benchmarks:
        if first.name not in others or "/" in first.name or first.metric in (*NATS, "top1_agreement"):
            continue
        pairs = list(zip(first.items, others[first.name].items, strict=True))
        found.append(
            Flips(first.name, [p for p in pairs if p[1].value > p[0].value], [p for p in pairs if p[1].value < p[0].value])
        )
    return found
