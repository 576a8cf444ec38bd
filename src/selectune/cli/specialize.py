"""The commands that make a specialist: ``selectune specialize``, ``plan``, ``resume`` and ``demo``.

Knows: their options and exit statuses. Does not know: how one is made; each command calls one function.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from selectune.cli.options import Quiet, RunFolder, recipe_values, takes_a_recipe
from selectune.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_OVER_BUDGET


@takes_a_recipe
def specialize(
    options: dict[str, Any],
    require_retention: Annotated[bool, typer.Option(help="Exit with status 3 when something was lost.")] = False,
) -> None:
    """Train a specialist and measure, before and after, what it gained and whether anything was lost.

    `selectune specialize questions.jsonl` is enough: everything else has a default.
    """
    from selectune import pipeline
    from selectune.reporting.terminal import show_verdict

    values = recipe_values(options | {"require_retention": require_retention})
    run = pipeline.specialize(options["train"], recipe=options["recipe"], quiet=options["quiet"], **values)
    _finish(run, show_verdict)


@takes_a_recipe
def plan(
    options: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a run would train, and the memory and time that training would take here; nothing is left behind.

    Takes the data and options of `selectune specialize` (or a recipe alone), prepares the data and runs about ten seconds of
    training. Exits with status 4 when a budget would be exceeded.
    """
    from selectune import pipeline
    from selectune.reporting.terminal import show_plan

    train, recipe = options["train"], options["recipe"]
    if train is not None and recipe is None and Path(train).suffix in (".yaml", ".yml"):
        recipe, train = Path(train), None
    try:
        predicted = pipeline.plan(train, recipe=recipe, quiet=options["quiet"] or as_json, **recipe_values(options))
    except KeyboardInterrupt:
        typer.echo("selectune: stopped; nothing is left behind", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        typer.echo(predicted.model_dump_json(indent=1))
    else:
        show_plan(predicted)
    if predicted.problems:
        raise typer.Exit(EXIT_OVER_BUDGET)


def resume(run: RunFolder, quiet: Quiet = False) -> None:
    """Take up a run where it was left, to the same result."""
    from selectune import pipeline
    from selectune.reporting.terminal import show_verdict

    _finish(pipeline.resume(run, quiet), show_verdict)


def demo(
    output: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    minutes: Annotated[
        float | None, typer.Option(help="Train for at most so many minutes, on a slow machine; learns less.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run the main job on the built-in example: the service manual of an invented machine."""
    from selectune import pipeline
    from selectune.demo import recipe
    from selectune.reporting.terminal import show_samples, show_verdict

    run = pipeline.specialize(recipe=recipe(output, minutes), quiet=quiet)
    show_samples(run, 4)
    _finish(run, show_verdict)


def _finish(run: Any, show: Any) -> None:
    from selectune.pipeline import verdict_of

    show(run)
    if run.recipe.evaluation.require_retention and verdict_of(run).retained == "lost":
        raise typer.Exit(EXIT_LOST)
