"""The command on examples: ``selectune select``.

Knows: its options, and what a person is shown of a choice. Does not know: how anything is chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def select(
    data: Annotated[str, typer.Argument(help="Records to choose from: a file, folder, glob or hub id.", show_default=False)],
    method: Annotated[
        str, typer.Option("--method", "-m", help="How: longest, ifd:fraction=0.2, ... See `selectune methods examples`.")
    ] = "facility_location",
    fraction: Annotated[float | None, typer.Option(help="Share of the pool.")] = None,
    count: Annotated[int | None, typer.Option(help="How many records (or tokens), instead of a share.")] = None,
    by: Annotated[str | None, typer.Option(help="What is counted: records, or tokens of responses.")] = None,
    target: Annotated[str | None, typer.Option(help="Records of the target, for methods that choose toward one.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the chosen records go, as JSON lines.")] = Path(
        "selected.jsonl"
    ),
    scores: Annotated[Path | None, typer.Option(help="Also write every record's signals, as parquet.")] = None,
    base: Annotated[
        str, typer.Option(help="The base that measures: built-in name, folder, .gguf file or hub id.")
    ] = "smollm2-135m-instruct",
    kept: Annotated[Path | None, typer.Option(help="Folder that keeps what is measured, so that it is measured once.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="A column's role: question=COLUMN. May be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Choose the records that are worth training on, and write them.

    ```
    selectune select pool.jsonl -m longest --fraction 0.1
    selectune select pool.jsonl -m sift --target examples-of-my-task.jsonl --count 500 --scores scores.parquet
    ```
    """
    from selectune.cli import pairs
    from selectune.examples.select import choose_examples

    given: dict[str, Any] = {"fraction": fraction, "count": count, "by": by}
    chosen = choose_examples(
        data, method, target=target, out=out, scores=scores, base=base, folder=kept, columns=pairs(column), seed=seed, quiet=quiet,
        **{key: value for key, value in given.items() if value is not None},
    )  # fmt: skip
    if not quiet:
        typer.echo(f"{chosen.chosen:,} of {chosen.pool:,} records ({chosen.tokens:,} tokens of responses) -> {out}", err=True)
        for note in chosen.notes:
            typer.echo(note, err=True)
