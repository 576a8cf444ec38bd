"""The command that compares methods: ``selectune experiment``.

Knows: its options. Does not know: how cells are run, or a page is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selectune.cli.options import DataRoot, Quiet
from selectune.errors import EXIT_INTERRUPTED


def experiment(
    file: Annotated[Path, typer.Argument(help="An experiment: methods x tasks x budgets x seeds.", show_default=False)],
    only: Annotated[str | None, typer.Option(help="Work on this method alone.")] = None,
    task: Annotated[str | None, typer.Option(help="Work on this task alone.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin nothing new after so many minutes.")] = None,
    page: Annotated[Path | None, typer.Option(help="The Markdown page to write; pictures and JSON go beside it.")] = None,
    page_only: Annotated[bool, typer.Option("--page-only", help="Run nothing, write the page.")] = False,
    data_root: DataRoot = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do again what failed.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Pieces of work at a time, each with its share of the threads.")] = 1,
    quiet: Quiet = False,
) -> None:
    """Run what is missing of an experiment and write its page: gain against forgetting, costs, ranks, what the papers say."""
    from selectune.experiment import experiment as run

    try:
        typer.echo(run(file, only=only, task=task, minutes=minutes, page=page, page_only=page_only, data_root=data_root,
                       retry_failed=retry_failed, workers=workers, quiet=quiet))  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("selectune: stopped; the same command goes on", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
