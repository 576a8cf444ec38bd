"""The report of a run: one HTML file, no network, verdict first.

Knows: the run folder's files and how they are laid out for a person. Does not know: how anything in them was computed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from selectune import __version__
from selectune.reporting import charts
from selectune.reporting.terminal import number, state_of
from selectune.run import DataSummary, Difference, Evaluation, Run, Sample, Scores, Verdict, write_atomically


def environment() -> Environment:
    """Return the templates' environment; everything is escaped unless it is a picture of ours."""
    made = Environment(loader=PackageLoader("selectune.reporting"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.globals.update(number=number, charts=charts, version=__version__)
    return made


def write_report(run: Run) -> Path:
    """Write ``report.html`` from the run folder alone; what is not there yet is said so."""
    verdict = run.read("verdict.json", Verdict) if run.has("verdict.json") else None
    before = run.read("base_evaluation.json", Evaluation) if run.has("base_evaluation.json") else None
    after = run.read("evaluation.json", Evaluation) if run.has("evaluation.json") else None
    scores = run.read("scores.json", Scores) if run.has("scores.json") else None
    page = (
        environment()
        .get_template("report.html")
        .render(
            run=run.name,
            state=state_of(run),
            verdict=verdict,
            rows=[(row, _picture(row, verdict.differences)) for row in verdict.differences] if verdict else [],
            curves=_curves(run),
            scores=scores,
            blocks=_blocks(scores),
            costs=run.costs(),
            samples=[Sample(**value) for value in _json(run, "samples.json", [])],
            flips=_flips(before, after),
            data=run.read("data.json", DataSummary) if run.has("data.json") else None,
            recipe=run.path("recipe.yaml").read_text(encoding="utf-8"),
            machine=_json(run, "environment.json", {}),
            training=_json(run, "training.json", {}),
        )
    )
    write_atomically(run.path("report.html"), page)
    return run.path("report.html")


def _json(run: Run, file: str, missing: Any) -> Any:
    return json.loads(run.path(file).read_text(encoding="utf-8")) if run.has(file) else missing


def _picture(row: Difference, rows: list[Difference]) -> str:
    """Draw a difference; the same scale for all rows of one unit."""
    alike = [other for other in rows if (other.metric in _NATS) == (row.metric in _NATS)]
    widest = max(max(abs(other.low), abs(other.high)) for other in alike) or 1.0
    sign = 1 if row.higher_is_better else -1
    clear = row.low > 0 or row.high < 0
    good = "plain" if not clear else "good" if sign * row.difference > 0 else "bad"
    return charts.interval(row.low, row.difference, row.high, widest, good)


_NATS = ("answer_nll", "cross_entropy", "kl")


def _curves(run: Run) -> str:
    if not run.has("metrics.jsonl"):
        return ""
    lines = []
    for text in run.path("metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    series = {
        "training loss": [(line["step"], line["loss"]) for line in lines if "loss" in line],
        "development loss": [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line],
    }
    return charts.lines({name: points for name, points in series.items() if points}, "Loss", "step", "nats per response token")


def _blocks(scores: Scores | None) -> str:
    if scores is None or not scores.blocks:
        return ""
    scored = all(block.score is not None for block in scores.blocks)
    values = [block.score if scored and block.score is not None else 1.0 for block in scores.blocks]
    title = "Fisher score of each block; trained blocks are dark" if scored else "Blocks; trained ones are dark"
    return charts.bars(values, [block.trained for block in scores.blocks], title)


def _flips(before: Evaluation | None, after: Evaluation | None) -> list[dict[str, Any]]:
    """Return, per benchmark, the items that became right and those that became wrong."""
    if before is None or after is None:
        return []
    found = []
    others = {benchmark.name: benchmark for benchmark in after.benchmarks}
    for first in before.benchmarks:
        second = others.get(first.name)
        if second is None or first.metric in (*_NATS, "top1_agreement") or "/" in first.name:
            continue
        pairs = list(zip(first.items, second.items, strict=True))
        right = [pair for pair in pairs if pair[1].value > pair[0].value]
        wrong = [pair for pair in pairs if pair[1].value < pair[0].value]
        found.append({"name": first.name, "right": right, "wrong": wrong})
    return found
