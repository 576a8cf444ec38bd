"""The commands on runs that are there: ``selectune runs``, ``report``, ``compare``, ``chat`` and ``export``.

Knows: their options. Does not know: what a run holds; each command calls one function.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selectune.cli.options import RunFolder


def runs(folder: Annotated[Path, typer.Argument(help="Folder that holds the runs.")] = Path("runs")) -> None:
    """List the runs of a folder."""
    from selectune.reporting.terminal import show_runs

    show_runs(folder)


def chat(
    run: RunFolder,
    question: Annotated[str | None, typer.Option(help="Ask one question and end.")] = None,
) -> None:
    """Ask the base and the specialist, side by side."""
    from selectune.reporting import chat as talking
    from selectune.run import Run

    talking.chat(Run.open(run), question)


def export(
    run: RunFolder,
    folder: Annotated[Path, typer.Argument(help="Where to write the model (for GGUF: a folder or a .gguf file).")],
    gguf: Annotated[bool, typer.Option("--gguf", help="Write a GGUF file instead of a transformers folder.")] = False,
    dtype: Annotated[str, typer.Option(help="auto (the base's own), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Write the specialist as a model that runs without Selectune, and check that it is the same model."""
    from selectune.merging.export import export_run
    from selectune.run import Run

    done = export_run(Run.open(run), folder, gguf, dtype)
    typer.echo(f"Wrote {done.path} ({done.size / 2**20:.0f} MiB, {done.dtype}).")
    typer.echo(f"Largest difference of a logit: {done.difference:.2g} (tolerated: {done.tolerance:g}).")


def report(run: RunFolder) -> None:
    """Write the report of a run again and print its path."""
    from selectune.reporting import write_report
    from selectune.run import Run

    typer.echo(write_report(Run.open(run)))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("comparison.html"),
) -> None:
    """Write one page that compares several runs: gain against forgetting, cost, settings."""
    from selectune.reporting import write_comparison
    from selectune.run import Run

    typer.echo(write_comparison([Run.open(folder) for folder in runs], output))
