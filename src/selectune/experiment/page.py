"""The page of an experiment: Markdown, a picture for each table, and one JSON with all cells.

Knows: how what was judged is written down. Does not know: how it was judged, or how a cell is run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from selectune import catalogue
from selectune.experiment import judging
from selectune.experiment.budget import entries_of
from selectune.experiment.judging import Comparison, Interval, Ranks
from selectune.experiment.plan import ENTRIES, NOT_RUN, RESOURCES, Plan
from selectune.experiment.protocol import MethodLine
from selectune.experiment.results import Row, Sheet, sheets
from selectune.reporting import charts
from selectune.run import write_atomically

_TITLES = {ENTRIES: "At equal trained entries and equal steps", RESOURCES: "At equal seconds, choosing included"}


def write_page(plan: Plan, path: Path) -> Path:
    """Write the page, its pictures and its JSON, as far as the experiment has come."""
    found = sheets(plan)
    protocol = plan.protocol
    lines = [f"# {protocol.name}", "", *_setting(plan)]
    for table, title in _TITLES.items():
        those = [sheet for sheet in found if sheet.table == table]
        if those:
            lines += [f"## {title}", ""]
        for sheet in those:
            lines += _sheet(sheet, plan, path)
        for budget in protocol.budgets:
            lines += _ranks(plan, [sheet for sheet in those if sheet.budget == budget], budget)
    claims = _claims(plan, found)
    lines += _claims_table(claims) + _not_run(found)
    write_atomically(path, "\n".join(lines).rstrip() + "\n")
    write_atomically(path.with_suffix(".json"), json.dumps(_plain(plan, found, claims), indent=1, ensure_ascii=False))
    return path


def _setting(plan: Plan) -> list[str]:
    protocol, training = plan.protocol, plan.protocol.training
    tasks = "; ".join(
        f"{name} ({task.train_records or 'all'} records to train on, {task.dev_records or 'all'} to tune on, {task.test_records or 'all'} to "
        f"measure on; gain: {_unit(task.metrics[0])})" for name, task in protocol.tasks.items()
    )  # fmt: skip
    steps = f"{training.max_steps} steps" if training.max_steps else f"{training.epochs:g} passes"
    return [
        f"Base: {protocol.base} ({plan.facts.total_parameters:,} weights). Tasks: {tasks}. Training: {steps} of "
        f"{training.batch_sequences} sequences of {training.max_length} tokens, {training.optimiser}. Seeds: "
        f"{', '.join(map(str, protocol.seeds))}; the learning rate is tuned on the development loss with the first. Intervals hold "
        f"{protocol.confidence:.0%}, over items and, with several seeds, over seeds.", "",
        "Gain: better at the target than the base. Forgetting: rise of cross-entropy on general text, in nats per token. *Random* is a "
        "random choice of the same size: of as many entries, or, for methods over whole blocks, of as many blocks.", "",
    ]  # fmt: skip


def _sheet(sheet: Sheet, plan: Plan, path: Path) -> list[str]:
    entries = entries_of(sheet.budget, plan.facts)
    unit = _unit(plan.protocol.tasks[sheet.task].metrics[0])
    lines = [f"### {sheet.task}, {_budget(sheet.budget)} ({entries:,} entries)", ""]
    rows = [row for row in sheet.rows if row.outcome is not None]
    if not rows:
        return [*lines, "Nothing was run yet.", ""]
    if len(rows) > 1:
        name = f"{path.stem}-{sheet.table}-{sheet.task}-{sheet.budget:g}.svg"
        spots = [charts.Spot(row.line.name, tuple(row.forgetting), tuple(row.gain)) for row in rows]  # type: ignore[arg-type]
        picture = charts.scatter(spots, "forgetting (nats per token)", f"gain ({unit})")
        write_atomically(path.with_name(name), charts.standalone(picture))
        lines += [f"![Gain against forgetting, {sheet.task}]({name})", ""]
    metrics = [metric for metric in plan.protocol.tasks[sheet.task].metrics if metric != "loss"]
    before = [f"loss of the right answer {judging.find(sheet.base, 'loss').score:.3f}"]
    before += [f"{metric} {judging.find(sheet.base, metric).score:.1%}" for metric in metrics]
    lines += [
        f"The base: {', '.join(before)}, cross-entropy on general text {judging.find(sheet.base, 'forgetting').score:.3f}.",
        "",
    ]
    lines += [
        f"| method | entries | gain ({unit}) | forgetting | KL | same top token | {''.join(f'{metric} | ' for metric in metrics)}rank | "
        "choosing, s | training, s | peak, GiB | PFLOP | learning rate | beats random on |",
        "|---|" + "---|" * (12 + len(metrics)),
    ]
    ordered = sorted(rows, key=lambda row: -row.gain.mean)
    for row in ordered:
        cells = row.cells
        mark = "" if all(cell.exact for cell in cells) else " †" if row.entries <= entries else " ‡"
        rate = ", ".join(sorted({f"{cell.learning_rate:g}" for cell in cells}))
        scores = "".join(f"{fmean(judging.find(c.benchmarks, metric).score for c in cells):.1%} | " for metric in metrics)
        edge = _edge(cells[0].grid, cells[0].learning_rate)
        lines.append(
            f"| {row.line.name} | {row.entries:,}{mark} | {_shown(row.gain)} | {_shown(row.forgetting)} | {row.mean('kl'):.3f} | "
            f"{row.mean('top1_agreement'):.1%} | {scores}{row.rank} | {fmean(c.choose.seconds for c in cells):.1f} | "
            f"{fmean(c.train.seconds for c in cells):.1f} | {fmean(c.peak_memory_bytes for c in cells) / 2**30:.2f} | "
            f"{fmean(c.choose.flops + c.train.flops for c in cells) / 1e15:.3g} | {rate}{edge} | {_beats(sheet, row, plan)} |"
        )
    return [*lines, "", *_marks(lines), *_against_random(sheet)]


def _edge(grid: dict[str, float | str], rate: float | None) -> str:
    """Mark a best learning rate at the edge of its grid: a better one may lie outside."""
    tried = sorted(map(float, grid))
    return " (edge)" if rate is not None and len(tried) > 1 and rate in (tried[0], tried[-1]) else ""


def _marks(lines: Sequence[str]) -> list[str]:
    marks = {"†": "† fewer entries than the budget: whole blocks, or a whole rank.", "‡": "‡ more entries than the budget."}
    said = [text for mark, text in marks.items() if any(f" {mark} |" in line for line in lines)]
    return [" ".join(said), ""] if said else []


def _beats(sheet: Sheet, row: Row, plan: Plan) -> str:
    known = [on for on in (judging.GAIN, judging.FORGETTING) if row.line.name in sheet.against_random[on]]
    if not known:
        return "–"
    won = [on for on in known if sheet.against_random[on][row.line.name].better(plan.protocol.confidence)]
    return "both" if len(won) == 2 else won[0] if won else "neither"


def _against_random(sheet: Sheet) -> list[str]:
    names = list(sheet.against_random[judging.GAIN])
    if not names:
        return []
    lines = [
        "| against random of the same size | control | gain | p (Holm) | forgetting (less is +) | p (Holm) |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        sides = [sheet.against_random[on][name] for on in (judging.GAIN, judging.FORGETTING)]
        lines.append(f"| {name} | {sheet.control[name]} | " + " | ".join(map(_compared, sides)) + " |")
    return [*lines, ""]


def _compared(found: Comparison) -> str:
    return f"{_shown(found.interval)} | {found.p_corrected:.2g}"


def _ranks(plan: Plan, those: Sequence[Sheet], budget: float) -> list[str]:
    lines: list[str] = []
    for on, title in ((judging.GAIN, "gain"), (judging.FORGETTING, "least forgetting")):
        blocks = [(row.line.name, (sheet.task, cell.seed), row.score(cell.seed, on))
                  for sheet in those for row in sheet.rows if row.outcome is not None for cell in row.cells]  # fmt: skip
        wanted = {block for _, block, _ in blocks}
        scores: dict[str, dict[Any, float]] = {}
        for name, block, score in blocks:
            scores.setdefault(name, {})[block] = score
        whole = {name: [by[block] for block in sorted(wanted)] for name, by in scores.items() if by.keys() == wanted}
        found = judging.ranks(whole, plan.protocol.confidence)
        if found is not None:
            lines += _ranked(found, title)
    return [f"### Ranks over tasks and seeds, {_budget(budget)}", "", *lines] if lines else []


def _ranked(found: Ranks, title: str) -> list[str]:
    best = min(found.mean.values())
    order = sorted(found.mean.items(), key=lambda one: one[1])
    said = ", ".join(f"{name} {rank:.2f}{'' if rank - best < found.critical_difference else ' *'}" for name, rank in order)
    return [f"By {title}, {found.blocks} blocks: {said}. Friedman p = {found.p_value:.2g}; critical difference (Nemenyi) "
            f"{found.critical_difference:.2f}: those with * are worse than the first.", ""]  # fmt: skip


def _claims(plan: Plan, found: Sequence[Sheet]) -> list[dict[str, Any]]:
    """Decide every claim on the table of equal entries, over all tasks and budgets where both methods were run."""
    decided = []
    for line in plan.protocol.methods:
        for claim in line.claim:
            pairs = []
            for sheet in found:
                if sheet.table != ENTRIES or (claim.tasks and sheet.task not in claim.tasks):
                    continue
                ours = sheet.outcome(line.name)
                theirs = None if claim.against == "base" else sheet.outcome(sheet.same_kind(claim.against, line))
                if ours is not None and (theirs is not None or claim.against == "base"):
                    pairs.append((ours, theirs))
            verdict, intervals = judging.decide(claim, pairs, plan.protocol.confidence)
            rule = f"{'better than' if claim.better_than else 'no worse than'} {claim.against} on {claim.on}"
            decided.append({"method": line.name, "paper": paper_of(line), "claim": claim.text, "verdict": verdict, "cells": len(pairs),
                            "rule": rule + (f", margin {claim.margin:g}" if claim.margin else ""),
                            "intervals": {on: list(one) for on, one in intervals.items()}})  # fmt: skip
    return decided


def paper_of(line: MethodLine) -> str:
    """Return where a method was published: what its line says, or the catalogue."""
    if line.paper:
        return line.paper
    plain = MethodLine(name=line.name, parameters="all")
    axes = (("parameters", "parameters"), ("adapters", "form"), ("policies", "policy"), ("objectives", "objective"))
    papers = [type(catalogue.create(axis, getattr(line, key) or "all")).paper
              for axis, key in axes if getattr(line, key) not in (None, getattr(plain, key))]  # fmt: skip
    return next(filter(None, papers), "")


def _claims_table(claims: Sequence[dict[str, Any]]) -> list[str]:
    if not claims:
        return []
    lines = ["## What the papers say", "", "Decided by the interval of the paired difference (better is +) over the tasks and budgets above.",
             "", "| method | paper | claim | rule | difference here | verdict |", "|---|---|---|---|---|---|"]  # fmt: skip
    for claim in claims:
        shown = ", ".join(f"{on} {_shown(Interval(*one))}" for on, one in claim["intervals"].items())
        lines.append(
            f"| {claim['method']} | {claim['paper']} | {claim['claim']} | {claim['rule']} | {shown or '–'} | **{claim['verdict']}** |"
        )
    return [*lines, ""]


def _not_run(found: Sequence[Sheet]) -> list[str]:
    lines = []
    for sheet in found:
        for row in sheet.rows:
            for seed, why in row.missing.items():
                lines.append(f"- {row.line.name}, {sheet.task}, {_budget(sheet.budget)}, seed {seed}"
                             f"{' (equal seconds)' if sheet.table == RESOURCES else ''}: {why}")  # fmt: skip
    failed = [line for line in lines if not line.endswith(f": {NOT_RUN}")]
    waiting = [line.removesuffix(f": {NOT_RUN}") for line in lines if line.endswith(f": {NOT_RUN}")]
    return (["## Failed", "", *failed, ""] if failed else []) + (["## Not run", "", *waiting, ""] if waiting else [])


def _plain(plan: Plan, found: Sequence[Sheet], claims: list[dict[str, Any]]) -> dict[str, Any]:
    machine = plan.store.folder / "environment.json"
    return {
        "protocol": plan.protocol.model_dump(mode="json"), "facts": plan.facts.model_dump(mode="json"),
        "machine": json.loads(machine.read_text(encoding="utf-8")) if machine.exists() else None, "claims": claims,
        "base": {sheet.task: [one.model_dump(mode="json") for one in sheet.base] for sheet in found},
        "cells": [cell.model_dump(mode="json") for sheet in found for row in sheet.rows for cell in row.all],
    }  # fmt: skip


def _shown(found: Interval) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _budget(budget: float) -> str:
    return f"{budget:,} entries" if isinstance(budget, int) else f"{100 * budget:g} % of the weights"


def _unit(metric: str) -> str:
    return "nats per token of the right answer" if metric == "loss" else f"share of items right, {metric.replace('_', ' ')}"
