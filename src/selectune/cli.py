"""The command line.

Knows: commands, options and exit statuses: 0 done, 2 a mistake in the input (one line), 3 something was lost and retention was
required, 130 interrupted with a checkpoint. Does not know: how anything is done; each command calls one function.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from selectune import __version__
from selectune.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_MISTAKE, UserError

app = typer.Typer(
    help="Turn a small language model into your domain's specialist: change only what matters, and prove that nothing else "
    "was lost.\n\nStart with: selectune specialize examples.jsonl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
recipe_app = typer.Typer()

RunFolder = Annotated[Path, typer.Argument(help="A run folder, such as runs/examples-lora.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


@app.command()
def specialize(
    train: Annotated[
        str | None, typer.Argument(help="Training data: a file, folder, glob or hub id.", show_default=False)
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe file; options below override it.")] = None,
    base: Annotated[str | None, typer.Option(help="Base: built-in name, folder, .gguf file or hub id.")] = None,
    test: Annotated[str | None, typer.Option(help="Target test set; left out: a tenth of the training data is held out.")] = None,
    form: Annotated[str | None, typer.Option(help="full, lora or qlora; with settings: lora:rank=8,alpha=16")] = None,
    parameters: Annotated[str | None, typer.Option(help="Which weights: all, fisher_blocks:k=8, last_blocks:k=8, ...")] = None,
    benchmarks: Annotated[str | None, typer.Option(help="General benchmarks, separated by commas: probe,hellaswag,...")] = None,
    data_root: Annotated[str | None, typer.Option(help="Folder with local copies of the benchmarks.")] = None,
    items: Annotated[int | None, typer.Option(help="Items of each benchmark.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="A column's role: question=COLUMN. May be repeated.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Training budget in minutes.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training budget in tokens.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most this many training records.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder that holds the runs.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    require_retention: Annotated[bool, typer.Option(help="Exit with status 3 when something was lost.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a hub model run code of its own.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a specialist and measure, before and after, what it gained and whether anything was lost.

    `selectune specialize questions.jsonl` is enough: everything else has a default.
    """
    from selectune import pipeline
    from selectune.reporting.terminal import show_verdict

    sections: dict[str, dict[str, Any]] = {
        "data": {"test": test, "columns": _pairs(column), "limit": limit},
        "training": {"epochs": epochs, "learning_rate": learning_rate},
        "budget": {"minutes": minutes, "tokens": tokens},
        "evaluation": {
            "benchmarks": benchmarks.split(",") if benchmarks else None, "data_root": data_root, "items": items,
            "require_retention": require_retention or None,
        },
    }  # fmt: skip
    top = {"base": base, "form": form, "parameters": parameters, "output": output, "name": name, "seed": seed,
           "trust_remote_code": trust_remote_code or None}  # fmt: skip
    values: dict[str, Any] = {key: value for key, value in top.items() if value is not None}
    for section, keys in sections.items():
        given = {key: value for key, value in keys.items() if value is not None}
        if given:
            values[section] = given
    run = pipeline.specialize(train, recipe=recipe, quiet=quiet, **values)
    _finish(run, show_verdict)


@app.command()
def resume(run: RunFolder, quiet: Quiet = False) -> None:
    """Take up a run where it was left, to the same result."""
    from selectune import pipeline
    from selectune.reporting.terminal import show_verdict

    _finish(pipeline.resume(run, quiet), show_verdict)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="Where to write the recipe.")] = Path("recipe.yaml"),
    train: Annotated[str | None, typer.Option(help="Training data to put into it.")] = None,
    force: Annotated[bool, typer.Option(help="Overwrite an existing file.")] = False,
) -> None:
    """Write a recipe with every key, its meaning and its default."""
    from selectune import recipe

    if file.exists() and not force:
        raise UserError("is there already", file=file, mend="name another file, or add --force")
    try:
        file.write_text(recipe.commented(**({"data": {"train": train}} if train else {})), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", file=file) from None
    typer.echo(f"Wrote {file}. Run it with: selectune specialize --recipe {file}")


@app.command("recipe")
def recipe_command(
    file: Annotated[Path | None, typer.Argument(help="A recipe to check and print in full.", show_default=False)] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema, for editors.")] = False,
) -> None:
    """Check a recipe, or print the schema of recipes."""
    from selectune import recipe

    if schema:
        typer.echo(recipe.schema())
    elif file is not None:
        typer.echo(recipe.dump(recipe.load(file)), nl=False)
    else:
        typer.echo(recipe.commented(), nl=False)


@app.command()
def methods(
    axis: Annotated[str | None, typer.Argument(help="parameters, adapters or objectives.", show_default=False)] = None,
) -> None:
    """List the methods of each axis, with their papers."""
    from selectune import catalogue

    for each in [axis] if axis else catalogue.AXES:
        if each not in catalogue.AXES:
            raise UserError(f"unknown axis '{each}'", expected=f"one of {', '.join(catalogue.AXES)}")
        typer.echo(f"{each}:")
        for name, method in catalogue.methods(each).items():
            typer.echo(f"  {name:22} {method.summary}" + (f"\n  {'':22} {method.paper}" if method.paper else ""))


@app.command()
def report(run: RunFolder) -> None:
    """Write the report of a run again and print its path."""
    from selectune.reporting import write_report
    from selectune.run import Run

    typer.echo(write_report(Run.open(run)))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("comparison.html"),
) -> None:
    """Write one page that compares several runs: gain against forgetting, cost, settings."""
    from selectune.reporting import write_comparison
    from selectune.run import Run

    typer.echo(write_comparison([Run.open(folder) for folder in runs], output))


@app.command("runs")
def runs_command(folder: Annotated[Path, typer.Argument(help="Folder that holds the runs.")] = Path("runs")) -> None:
    """List the runs of a folder."""
    from selectune.reporting.terminal import show_runs

    show_runs(folder)


@app.command()
def chat(
    run: RunFolder,
    question: Annotated[str | None, typer.Option(help="Ask one question and end.")] = None,
) -> None:
    """Ask the base and the specialist, side by side."""
    from selectune.reporting import chat as talking
    from selectune.run import Run

    talking.chat(Run.open(run), question)


@app.command()
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


@app.command()
def doctor() -> None:
    """Say what this machine can do."""
    from selectune.models import doctor as look
    from selectune.reporting.terminal import show_doctor

    show_doctor(look())


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    quiet: Quiet = False,
) -> None:
    """Run the main job on the built-in example: the service manual of an invented machine."""
    from selectune import pipeline
    from selectune.demo import recipe
    from selectune.reporting.terminal import show_samples, show_verdict

    run = pipeline.specialize(recipe=recipe(output), quiet=quiet)
    show_samples(run, 4)
    _finish(run, show_verdict)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _finish(run: Any, show: Any) -> None:
    from selectune.pipeline import verdict_of

    show(run)
    if run.recipe.evaluation.require_retention and verdict_of(run).retained == "lost":
        raise typer.Exit(EXIT_LOST)


def _pairs(given: list[str] | None) -> dict[str, str] | None:
    if not given:
        return None
    for text in given:
        if "=" not in text:
            raise UserError(f"'{text}' is not role=column", field="--column", expected="for instance question=Question")
    return dict(text.split("=", 1) for text in given)  # type: ignore[misc]


def main_without_exit() -> None:
    """Run the command line and return, for callers that go on afterwards."""
    app(standalone_mode=False)


def main() -> None:
    """Run the command line; a user's mistake is one line and status 2, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    try:
        app()
    except UserError as error:
        print(f"selectune: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except MemoryError:
        print("selectune: out of memory; to mend it: halve training.micro_batch_sequences", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except OSError as error:
        if error.errno not in (28, 13, 30):  # no space, no permission, read-only
            raise
        print(f"selectune: {error.filename or 'the disk'}: {error.strerror}; to mend it: free space or name another --output, "
              "then `selectune resume`", file=sys.stderr)  # fmt: skip
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        print("selectune: stopped; go on with `selectune resume RUN`", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if type(error).__name__ != "Interrupted":
            raise
        print(f"selectune: {error}; go on with `selectune resume RUN` (see `selectune runs`)", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
