"""The page of an experiment: Markdown, a picture for each table, and one JSON with all cells.

Knows: how what was judged is written down. Does not know: how it was judged, or how a cell is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selectune import catalogue
from selectune.experiment import judging
from selectune.experiment.beside import evenness, indicators
from selectune.experiment.budget import entries_of
from selectune.experiment.columns import EDGE, columns, shown, unit
from selectune.experiment.judging import Comparison, Interval, Ranks
from selectune.experiment.lines import RANDOM, MethodLine
from selectune.experiment.plan import ENTRIES, NOT_RUN, RESOURCES, Plan
from selectune.experiment.record import pools_of, write_record
from selectune.experiment.results import Row, Sheet, sheets
from selectune.reporting import charts
from selectune.run import write_atomically

_TITLES = {
    "parameters": {ENTRIES: "At equal trained entries and equal steps", RESOURCES: "At equal seconds, choosing included"},
    "examples": {ENTRIES: "At equal chosen tokens and equal steps", RESOURCES: "At equal seconds, choosing included"},
}


def write_page(plan: Plan, path: Path) -> Path:
    """Write the page, its pictures and its JSON, as far as the experiment has come."""
    found = sheets(plan)
    protocol = plan.protocol
    metrics = {name: [str(one) for one in task.metrics] for name, task in protocol.tasks.items()}
    record = path.with_suffix(".json")
    lines = [f"# {protocol.name}", "", *_setting(plan, pools_of(plan, record))]
    for table, title in _TITLES[protocol.axis].items():
        those = [sheet for sheet in found if sheet.table == table]
        if those:
            lines += [f"## {title}", ""]
        for sheet in those:
            lines += _sheet(sheet, plan, path)
        for budget in protocol.budgets:
            lines += _ranks(plan, [sheet for sheet in those if sheet.budget == budget], budget)
            lines += evenness([sheet for sheet in those if sheet.budget == budget], metrics)
    claims = _claims(plan, found)
    lines += _claims_table(claims) + _not_run(plan, found)
    write_atomically(path, "\n".join(lines).rstrip() + "\n")
    write_record(plan, found, claims, record)
    return path


def _setting(plan: Plan, pools: dict[str, dict[str, int]]) -> list[str]:
    protocol, training = plan.protocol, plan.protocol.training
    tasks = "; ".join(
        f"{name} ({task.train_records or 'all'} records to train on, {task.dev_records or 'all'} to tune on, {task.test_records or 'all'} to "
        f"measure on; gain: {unit(task.metrics[0])})" for name, task in protocol.tasks.items()
    )  # fmt: skip
    steps = f"{training.max_steps} steps" if training.max_steps else f"{training.epochs:g} passes"
    batch = "one sequence" if training.batch_sequences == 1 else f"{training.batch_sequences} sequences"
    return [
        f"Base: {protocol.base} ({plan.facts.total_parameters:,} weights). Tasks: {tasks}. Training: {steps} of "
        f"{batch} of {training.max_length} tokens, {training.optimiser}. Seeds: "
        f"{', '.join(map(str, protocol.seeds))}; the learning rate is tuned on the development loss with the first. Intervals hold "
        f"{protocol.confidence:.0%}, over items and, with several seeds, over seeds.", "",
        "Gain: better at the target than the base. Forgetting: rise of cross-entropy on general text, in nats per token. "
        + (_band_in_words(plan) if protocol.axis == "examples" else "*Random* is a random choice of the same size: of as many entries, or, "
           "for methods over whole blocks, of as many blocks."), "",
        *(line for name, sizes in pools.items() for line in _pool(name, sizes)),
    ]  # fmt: skip


def _band_in_words(plan: Plan) -> str:
    draws = next((len(plan.protocol.seeds_of(line)) for line in plan.lines if line.name == RANDOM), 0)
    others = sum(line.name != RANDOM for line in plan.lines)
    chance = others * (1 - plan.protocol.confidence) / 2
    return (f"*Random* chooses as many trained tokens at random, with {draws} seeds. A method is better than random only outside the band "
            f"in which {plan.protocol.confidence:.0%} of further random choices would lie (Student's, over those seeds); p is not corrected: of "
            f"{others} methods no better than random, {chance:.1f} would lie above the band by chance. Every method trains for the "
            "same number of steps of packed sequences, so a small choice is seen more often.")  # fmt: skip


def _pool(name: str, sizes: dict[str, int]) -> list[str]:
    """Say what a task's pool is made of."""
    said = ", ".join(f"{count:,} {kind}" for kind, count in sizes.items() if count)
    return [f"The pool of {name}: {sum(sizes.values()):,} records ({said}).", ""]


def _sheet(sheet: Sheet, plan: Plan, path: Path) -> list[str]:
    examples, task = plan.protocol.axis == "examples", plan.protocol.tasks[sheet.task]
    entries = 0 if examples else entries_of(sheet.budget, plan.facts)
    lines = [f"### {sheet.task}, {_budget(sheet.budget, plan)}{'' if examples else f' ({entries:,} entries)'}", ""]
    rows = sorted((row for row in sheet.rows if row.outcome is not None), key=lambda row: -row.gain.mean)
    if not rows:
        return [*lines, "Nothing was run yet.", ""]
    if len(rows) > 1:
        lines += _pictures(sheet, rows, plan, path)
    metrics = [metric for metric in task.metrics if metric != "loss"]
    before = [f"loss of the right answer {judging.find(sheet.base, 'loss').score:.3f}"]
    before += [f"{metric} {judging.find(sheet.base, metric).score:.1%}" for metric in metrics]
    lines += [
        f"The base: {', '.join(before)}, cross-entropy on general text {judging.find(sheet.base, 'forgetting').score:.3f}.",
        "",
    ]
    table = columns(sheet, plan, entries)
    lines += ["| " + " | ".join(column.title for column in table) + " |", "|" + "---|" * len(table)]
    lines += ["| " + " | ".join(column.text(row) for column in table) + " |" for row in rows]
    beside = indicators(sheet, task.metrics[0]) if examples else []
    return [*lines, "", *_marks(lines), *_against_random(sheet, examples), *beside]


def _pictures(sheet: Sheet, rows: Sequence[Row], plan: Plan, path: Path) -> list[str]:
    """Draw gain against forgetting; of examples, also each gain beside the band of random choices."""
    stem, gain = (
        f"{path.stem}-{sheet.table}-{sheet.task}-{sheet.budget:g}",
        f"gain ({unit(plan.protocol.tasks[sheet.task].metrics[0])})",
    )
    spots = [charts.Spot(row.line.name, tuple(row.forgetting), tuple(row.gain)) for row in rows]  # type: ignore[arg-type]
    drawn = {f"{stem}.svg": ("Gain against forgetting", charts.scatter(spots, "forgetting (nats per token)", gain))}
    band = next(iter(sheet.against_random[judging.GAIN].values()), None)
    control = sheet.outcome(RANDOM)
    if plan.protocol.axis == "examples" and band is not None and control is not None:
        middle, reach = float(control.means(judging.GAIN).mean()), (band.interval.high - band.interval.low) / 2
        picture = charts.dots(
            [(row.line.name, tuple(row.gain)) for row in rows],  # type: ignore[misc]
            (middle - reach, middle, middle + reach),
            gain,
            "band of random choices",
        )
        drawn[f"{stem}-band.svg"] = ("Gain beside the band of random choices", picture)
    lines = []
    for name, (title, picture) in drawn.items():
        write_atomically(path.with_name(name), charts.standalone(picture))
        lines += [f"![{title}, {sheet.task}]({name})", ""]
    return lines


def _marks(lines: Sequence[str]) -> list[str]:
    marks = {"†": "† fewer entries than the budget: whole blocks, or a whole rank.", "‡": "‡ more entries than the budget."}
    said = [text for mark, text in marks.items() if any(f" {mark} |" in line for line in lines)]
    edges, rows = sum(EDGE in line for line in lines), sum(line.startswith("| ") for line in lines) - 1
    if edges:
        said.append(f"{EDGE}, {edges} of {rows}: the best learning rate is the last of those tried, so another may be better; what such a line "
                    "gains more or less than another may be its learning rate's doing.")  # fmt: skip
    return [" ".join(said), ""] if said else []


def _against_random(sheet: Sheet, by_draws: bool) -> list[str]:
    names = list(sheet.against_random[judging.GAIN])
    if not names:
        return []
    p = "p" if by_draws else "p (Holm)"
    lines = [
        f"| against random of the same size | control | gain | {p} | forgetting (less is +) | {p} |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        sides = [sheet.against_random[on][name] for on in (judging.GAIN, judging.FORGETTING)]
        lines.append(f"| {name} | {sheet.control[name]} | " + " | ".join(map(_compared, sides)) + " |")
    return [*lines, ""]


def _compared(found: Comparison) -> str:
    return f"{shown(found.interval)} | {found.p_corrected:.2g}"


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
    return [f"### Ranks over tasks and seeds, {_budget(budget, plan)}", "", *lines] if lines else []


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
            by_draws = plan.protocol.axis == "examples" and claim.against == RANDOM
            verdict, intervals = judging.decide(claim, pairs, plan.protocol.confidence, by_draws)
            rule = f"{'better than' if claim.better_than else 'no worse than'} {claim.against} on {claim.on}"
            decided.append({"method": line.name, "paper": paper_of(line), "claim": claim.text, "verdict": verdict, "cells": len(pairs),
                            "rule": rule + (f", margin {claim.margin:g}" if claim.margin else ""),
                            "intervals": {on: list(one) for on, one in intervals.items()}})  # fmt: skip
    return decided


def paper_of(line: MethodLine) -> str:
    """Return where a method was published: what its line says, or the catalogue."""
    if line.paper:
        return line.paper
    plain = MethodLine(name=line.name, parameters="all", form="full" if line.examples == "all" else line.form)
    asked = {
        axis: getattr(line, key) for axis, key in catalogue.KEYS.items() if getattr(line, key) not in (None, getattr(plain, key))
    }
    by_rank = sorted(asked, key=lambda axis: axis == "adapters")  # last: others' methods train in LoRA's form too
    papers = [type(catalogue.create(axis, asked[axis])).paper for axis in by_rank]
    return next(filter(None, papers), "")


def _claims_table(claims: Sequence[dict[str, Any]]) -> list[str]:
    if not claims:
        return []
    lines = ["## What the papers say", "", "Decided by the interval of the paired difference (better is +) over the tasks and budgets above.",
             "", "| method | paper | claim | rule | difference here | verdict |", "|---|---|---|---|---|---|"]  # fmt: skip
    for claim in claims:
        said = ", ".join(f"{on} {shown(Interval(*one))}" for on, one in claim["intervals"].items())
        lines.append(
            f"| {claim['method']} | {claim['paper']} | {claim['claim']} | {claim['rule']} | {said or '–'} | **{claim['verdict']}** |"
        )
    return [*lines, ""]


def _not_run(plan: Plan, found: Sequence[Sheet]) -> list[str]:
    lines = []
    for sheet in found:
        for row in sheet.rows:
            for seed, why in row.missing.items():
                lines.append(f"- {row.line.name}, {sheet.task}, {_budget(sheet.budget, plan)}, seed {seed}"
                             f"{' (equal seconds)' if sheet.table == RESOURCES else ''}: {why}")  # fmt: skip
    failed = [line for line in lines if not line.endswith(f": {NOT_RUN}")]
    waiting = [line.removesuffix(f": {NOT_RUN}") for line in lines if line.endswith(f": {NOT_RUN}")]
    return (["## Failed", "", *failed, ""] if failed else []) + (["## Not run", "", *waiting, ""] if waiting else [])


def _budget(budget: float, plan: Plan) -> str:
    what, of = ("tokens", "of the pool's trained tokens") if plan.protocol.axis == "examples" else ("entries", "of the weights")
    return f"{budget:,} {what}" if isinstance(budget, int) else f"{100 * budget:g} % {of}"
