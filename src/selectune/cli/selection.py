"""Commands about what trains and what changed: ``selectune selection`` and ``selectune delta``.

Knows: their options and what they say. Does not know: how anything is done; each command calls one function.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

selection_app = typer.Typer(
    name="selection", help="What trains: pictures, exact counts, overlaps.", no_args_is_help=True, rich_markup_mode="markdown"
)
delta_app = typer.Typer(
    name="delta",
    help="What changed: specialists that were trained in place, as sparse deltas of their base.\n\n"
    "A DELTA is a run that trained in place (`form: full`), its `specialist` folder, a folder written by these commands, or a SHiRA "
    "adapter of PEFT's. A base or MODEL is a built-in name, a transformers folder, a .gguf file or a hub id.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Where = Annotated[
    Path, typer.Argument(help="A run, a specialist or delta folder, or a selection.safetensors.", show_default=False)
]
Deltas = Annotated[list[Path], typer.Argument(help="One or more deltas.", show_default=False)]
OneDelta = Annotated[Path, typer.Argument(metavar="DELTA", help="A run that trained in place, or a delta.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write it; must not be there yet.", show_default=False)]
Base = Annotated[str | None, typer.Option(help="The base, where it is not where it was at training.")]


class Format(StrEnum):
    """What a delta can be written as."""

    shira = "shira"
    delta = "delta"


@selection_app.command("show")
def show(
    where: Where,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The picture: .html or .svg. Left out: selection.html beside the selection."),
    ] = None,
) -> None:
    """Show the share of every matrix of every block that may change, with exact counts, and draw it."""
    from selectune.merging.files import selection_at
    from selectune.reporting.selection import show_selection, size_of_base, write_picture

    selection, size = selection_at(where), size_of_base(where)
    show_selection(selection, where.name, *size)
    beside = where.with_suffix(".html") if where.is_file() else where / "selection.html"
    typer.echo(f"Picture: {write_picture(selection, where.name, output or beside, *size)}")


@selection_app.command("overlap")
def overlap(one: Where, other: Where) -> None:
    """Show how much two selections have in common: counts, shares and Jaccard index by matrix, beside what chance would give."""
    from selectune.merging.files import selection_at
    from selectune.parameters.overlap import overlap as compare
    from selectune.reporting.selection import show_overlap

    show_overlap(compare(selection_at(one), selection_at(other)), (one.name, other.name))


@delta_app.command()
def apply(deltas: Deltas, output: Output, base: Base = None) -> None:
    """Write the base with a delta (with the sum of several) applied, as a transformers folder.

    Example: `selectune delta apply runs/tidewren-full runs/law-full --output both`
    """
    from selectune.merging import files

    delta = files.apply(deltas, output, base)
    typer.echo(f"Wrote {output}: '{delta.spec}' with {delta.count():,} entries changed.")


@delta_app.command()
def revert(
    model: Annotated[str, typer.Argument(help="A model with the delta applied.", show_default=False)],
    delta: OneDelta,
    output: Output,
    base: Base = None,
) -> None:
    """Write the base that a model was made from: the entries of the delta get their original values back, bit for bit.

    Where the base is at hand every weight is compared with it.
    """
    from selectune.merging import files

    compared = files.revert(model, delta, output, base)
    typer.echo(
        f"Wrote {output}: " + ("it is the base, bit for bit." if compared else "the base is not at hand to compare it with.")
    )


@delta_app.command()
def diff(
    base: Annotated[str, typer.Argument(help="The base.", show_default=False)],
    model: Annotated[str, typer.Argument(help="A model of the same architecture, or a delta.", show_default=False)],
    output: Output,
) -> None:
    """Write what differs between a base and a model, whoever trained it: only the entries whose bits differ.

    Example: `selectune delta diff smollm2-135m-instruct my-model --output my-delta`
    """
    from selectune.merging import files

    typer.echo(f"Wrote {output}: {files.diff(base, model, output).count():,} entries.")


@delta_app.command()
def compose(
    deltas: Deltas,
    output: Output,
    minus: Annotated[list[Path] | None, typer.Option(help="A delta whose changes are taken away. May be repeated.")] = None,
    base: Base = None,
) -> None:
    """Write the sum of several deltas' changes, on all entries that any of them touches. The order does not matter.

    Example: `selectune delta compose runs/manual-full runs/law-full --output both`
    """
    from selectune.merging import files

    typer.echo(f"Wrote {output}: {files.compose(deltas, minus or [], output, base).count():,} entries.")


@delta_app.command()
def restrict(delta: OneDelta, selection: Where, output: Output, base: Base = None) -> None:
    """Write a delta on the entries alone that a selection (or another delta's support) names; the others stay as in the base."""
    from selectune.merging import files

    typer.echo(f"Wrote {output}: {files.restrict(delta, selection, output, base).count():,} entries.")


@delta_app.command()
def convert(
    delta: OneDelta,
    output: Output,
    to: Annotated[Format, typer.Option(help="A SHiRA adapter, for PEFT, or a delta.")] = Format.shira,
    base: Base = None,
) -> None:
    """Write a delta as a SHiRA adapter that plain PEFT loads, or such an adapter as a delta."""
    from selectune.merging import files

    missed = files.convert(delta, to.value, output, base)
    typer.echo(f"Wrote {output}." + (f" {missed:,} entries come back one rounding away in fp32." if missed else ""))
