"""Tables in the terminal. Knows: how things are shown to a person there. Does not know: how they were computed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selectune.errors import UserError
from selectune.reporting.wording import TONES, number, state_of
from selectune.run import DataSummary, Run, Sample, Verdict

if TYPE_CHECKING:
    from selectune.training import Prediction

COLOURS = {"good": "green", "bad": "red", "warn": "yellow"}


def show_data(summary: DataSummary, console: Console | None = None) -> None:
    """Show what the data was found to be, before training."""
    console = console or Console(stderr=True)
    columns = ", ".join(f"{role} = {name}" for role, name in summary.columns.items())
    console.print(f"[bold]Data[/]: {summary.read:,} records of shape [bold]{escape(summary.shape)}[/] ({escape(columns)})")
    for dropped in summary.dropped:
        console.print(f"  left out: {dropped.count:,} {dropped.reason}, such as {escape(dropped.examples[0][:80])!r}")
    splits = ", ".join(f"{count:,} {name}" for name, count in summary.splits.items())
    console.print(f"  used: {splits}")
    for warning in summary.warnings:
        console.print(f"  [yellow]note[/]: {escape(warning)}")
    console.print(escape(summary.example[:400]), style="dim")


def show_plan(plan: Prediction, console: Console | None = None) -> None:
    """Show what a run would be and take."""
    console = console or Console()
    table = Table(title="Plan of the training", title_justify="left", box=SIMPLE_HEAD, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    share = plan.trained_parameters / plan.total_parameters
    method = f"{_said(plan.form)}, {_said(plan.parameters)}"
    table.add_row("base", escape(plan.base))
    table.add_row(
        "trained", f"{plan.trained_parameters:,} parameters, {share:.2%} of {plan.total_parameters:,} ({escape(method)})"
    )
    table.add_row("data", f"{plan.tokens:,} tokens ({plan.response_tokens:,} of responses) in {plan.sequences:,} sequences")
    table.add_row(
        "steps", f"{plan.steps:,} ({plan.epochs:g} epochs), {_count(plan.micro_batch_sequences, 'sequence')} a forward pass"
    )
    table.add_row("operations", f"{_scientific(plan.flops)} on {plan.training_tokens:,} tokens")
    how = "measured on a few steps" if plan.memory_measured else "counted, not measured"
    table.add_row("memory", f"{plan.memory_bytes / 2**30:.1f} GiB of {plan.memory_limit_bytes / 2**30:.1f} ({how})")
    if plan.saved_by:
        most = ", ".join(f"{kind} {size / 2**20:.1f}" for kind, size in list(plan.saved_by.items())[:6])
        rest = ", ..." if len(plan.saved_by) > 6 else ""
        table.add_row("kept to go back", f"{sum(plan.saved_by.values()) / 2**20:.1f} MiB a sequence: {escape(most)}{rest}")
    if plan.seconds is not None:
        speed = f" ({plan.tokens_per_second:,.0f} tokens/s)" if plan.tokens_per_second else ""
        table.add_row("training", f"{_duration(plan.seconds)}{speed}")
    table.add_row("choosing", f"{_duration(plan.seconds_of_choosing)}, before training")
    table.add_row("not included", "measuring base and specialist")
    console.print(table)
    for note in plan.notes:
        console.print(f"[yellow]note[/]: {escape(note)}")
    for problem in plan.problems:
        console.print(f"[red]over budget[/]: {escape(problem)}")


def _said(method: dict[str, Any]) -> str:
    """Return a method as the command line writes it, its size alone."""
    sizes = ",".join(f"{key}={method[key]}" for key in ("k", "rank") if key in method)
    return f"{method['method']}{':' if sizes else ''}{sizes}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _scientific(value: float) -> str:
    return f"{value:.2e}".replace("e+", "e")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def show_verdict(run: Run, console: Console | None = None) -> None:
    """Show the verdict's table and the path of the report."""
    console = console or Console()
    verdict = run.read("verdict.json", Verdict)
    table = Table(title=f"{run.name}: before and after", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("measured", no_wrap=True)
    for column in ("before", "after", "change", f"{verdict.confidence:.0%} interval"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in verdict.differences:
        interval = f"{number(row, row.low, True)} to {number(row, row.high, True)}"
        colour = COLOURS.get(TONES.get(row.verdict, ""))
        said = f"[{colour}]{row.verdict}[/]" if colour else row.verdict
        name = row.benchmark.removeprefix("forgetting/").replace("_", " ")
        table.add_row(name, number(row, row.before), number(row, row.after), number(row, row.difference, True), interval, said)
    console.print(table)
    console.print(f"[bold]{escape(verdict.headline)}[/]")
    console.print(f"Report: {run.path('report.html')}", soft_wrap=True)


def show_samples(run: Run, count: int = 4, console: Console | None = None) -> None:
    """Show some answers before and after."""
    import json

    console = console or Console()
    table = Table(title="Answers before and after", title_justify="left", show_lines=True)
    for column in ("question", "wanted", "before", "after"):
        table.add_column(column, overflow="fold")
    for value in json.loads(run.path("samples.json").read_text(encoding="utf-8"))[:count]:
        sample = Sample(**value)
        table.add_row(*(escape(text[:160]) for text in (sample.prompt, sample.target, sample.before, sample.after)))
    console.print(table)


def show_runs(folder: Path, console: Console | None = None) -> None:
    """List the runs of a folder.

    Raises:
        UserError: the folder is not there, or holds no run.
    """
    console = console or Console()
    runs = [Run(path.parent) for path in sorted(folder.glob("*/recipe.yaml"))] if folder.is_dir() else []
    if not runs:
        raise UserError("holds no runs", file=folder, mend="name the folder that was given as --output")
    table = Table(title=f"Runs in {folder}", title_justify="left")
    for column in ("run", "state", "target", "retained"):
        table.add_column(column)
    for run in runs:
        gain = retained = ""
        if run.has("verdict.json"):
            verdict = run.read("verdict.json", Verdict)
            target = next((row for row in verdict.differences if row.benchmark == "target"), None)
            gain = f"{number(target, target.before)} to {number(target, target.after)}" if target else verdict.gained
            retained = verdict.retained
        table.add_row(escape(run.name), state_of(run), gain, retained)
    console.print(table)


def show_doctor(checks: list[Any], console: Console | None = None) -> None:
    """Show what the doctor found."""
    console = console or Console()
    for check in checks:
        mark = "[green]ok[/]  " if check.ok else "[red]look[/]"
        console.print(f"{mark} {check.name}: {escape(check.found)}" + ("" if check.ok else f" — {escape(check.advice)}"))
