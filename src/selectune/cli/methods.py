"""``selectune methods``: the catalogue, for a person.

Knows: its options, and that an axis may follow directly. Does not know: any method, or how one is shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class _ListFirst(TyperGroup):
    """``selectune methods AXIS`` is ``selectune methods list AXIS``, and so is ``selectune methods``."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        if not arguments or (not arguments[0].startswith("-") and arguments[0] not in self.commands):
            arguments = ["list", *arguments]
        return super().parse_args(context, arguments)


methods_app = typer.Typer(
    name="methods",
    cls=_ListFirst,
    help="The methods of each axis, their papers and hyper-parameters.\n\n"
    "`selectune methods` lists all of them, `selectune methods parameters` those of one axis.",
    rich_markup_mode="markdown",
)


@methods_app.command("list")
def list_methods(axis: Annotated[str | None, typer.Argument(help="An axis; left out: all.", show_default=False)] = None) -> None:
    """List methods: name, summary, paper."""
    from selectune.reporting.methods import show_methods

    show_methods(axis)


@methods_app.command()
def show(name: Annotated[str, typer.Argument(help="The name of a method.", show_default=False)]) -> None:
    """Show one method: paper, departures from it, every hyper-parameter, and the lines that use it."""
    from selectune.reporting.methods import show_method

    show_method(name)


@methods_app.command()
def write(
    folder: Annotated[Path, typer.Argument(help="Where to write the pages.")] = Path("docs/methods"),
    evidence: Annotated[Path, typer.Option(help="The folder of the experiments' pages, where there are some.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Write the pages of the documentation from the catalogue; pages of families that are gone are removed."""
    from selectune.reporting.methods import write_pages

    typer.echo(f"Wrote {len(write_pages(folder, evidence))} pages to {folder}.")
