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
        str,
        typer.Option(
            "--method", "-m", "--examples", help="How: longest, ifd:fraction=0.2, ... See `selectune methods examples`."
        ),
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
    endpoint: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible endpoint that answers, for methods that ask a model.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model's name there; or a local one that answers.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Ask nothing; say how many calls, tokens and costs there would be.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    engine: Annotated[str, typer.Option(help="Where signals are measured: local, or ray for many machines.")] = "local",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Choose the records that are worth training on, and write them.

    ```
    selectune select pool.jsonl -m longest --fraction 0.1
    selectune select pool.jsonl -m sift --target examples-of-my-task.jsonl --count 500 --scores scores.parquet
    selectune select pool.jsonl -m robust_ft --endpoint http://localhost:8000/v1 --model NAME --dry-run
    ```
    """
    from selectune.cli.options import pairs
    from selectune.examples.select import choose_examples, count_questions

    given: dict[str, Any] = {"fraction": fraction, "count": count, "by": by, "by_endpoint": endpoint, "by_model": model}
    asked: dict[str, Any] = {
        "target": target,
        "base": base,
        "folder": kept,
        "columns": pairs(column),
        "seed": seed,
        "quiet": quiet,
    }
    asked |= {key: value for key, value in given.items() if value is not None}
    if dry_run:
        there = count_questions(data, method, **asked)
        costs = "" if there.cost is None else f", for {there.cost:,.2f}"
        told = f"{there.calls:,} calls, about {there.read:,} tokens read and {there.written:,} written{costs}"
        typer.echo(f"{told}; questions that follow from answers are not counted")
        return
    chosen = choose_examples(data, method, out=out, scores=scores, engine=engine, **asked)
    if not quiet:
        typer.echo(f"{chosen.chosen:,} of {chosen.pool:,} records ({chosen.tokens:,} tokens of responses) -> {out}", err=True)
        for note in chosen.notes:
            typer.echo(note, err=True)
