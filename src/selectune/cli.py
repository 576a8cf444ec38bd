"""The command line.

Knows: commands, options and exit statuses: 0 done, 2 a mistake in the input (one line), 3 something was lost and retention was
required, 4 a plan exceeds a budget, 130 interrupted with a checkpoint. Does not know: how anything is done; each command calls one function.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from selectune import __version__
from selectune.cli_ask import ask
from selectune.cli_audit import drift, novelty
from selectune.cli_domains import domains
from selectune.cli_examples import select
from selectune.cli_methods import methods_app
from selectune.cli_selection import delta_app, selection_app
from selectune.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_MISTAKE, EXIT_OVER_BUDGET, UserError, unwritable

app = typer.Typer(
    help="Turn a small language model into your domain's specialist: change only what matters, and prove that nothing else "
    "was lost.\n\nStart with: selectune specialize examples.jsonl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(methods_app, name="methods")
app.add_typer(selection_app, name="selection")
app.add_typer(delta_app, name="delta")
app.command()(select)
app.command()(ask)
app.command()(domains)
app.command()(novelty)
app.command()(drift)

RunFolder = Annotated[Path, typer.Argument(help="A run folder, such as runs/examples-lora.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


Train = Annotated[str | None, typer.Argument(help="Training data: a file, folder, glob or hub id.", show_default=False)]
RecipeFile = Annotated[Path | None, typer.Option(help="A recipe file; options below override it.")]
Base = Annotated[str | None, typer.Option(help="Base: built-in name, folder, .gguf file or hub id.")]
Test = Annotated[str | None, typer.Option(help="Target test set; left out: a tenth of the training data is held out.")]
Target = Annotated[
    str | None, typer.Option(help="Records of the target, for choosing among the training records; never those of the test.")
]
Form = Annotated[
    str | None,
    typer.Option(help="In which form: full, lora, ...; with settings: lora:rank=8,alpha=16. See selectune methods adapters."),
]
Parameters = Annotated[
    str | None, typer.Option(help="Which weights: all, fisher_blocks:k=8, ... See selectune methods parameters.")
]
Examples = Annotated[
    str | None, typer.Option(help="Which records: all, longest:fraction=0.2, ... See selectune methods examples.")
]
Policy = Annotated[
    str | None, typer.Option(help="What acts while it trains: gradient_mask:keep=0.2, ... See selectune methods policies.")
]
Finish = Annotated[str | None, typer.Option(help="What is kept of the training: recovery, ... See selectune methods merging.")]
Benchmarks = Annotated[str | None, typer.Option(help="General benchmarks, separated by commas: probe,hellaswag,...")]
DataRoot = Annotated[str | None, typer.Option(help="Folder with local copies of the benchmarks.")]
Items = Annotated[int | None, typer.Option(help="Items of each benchmark.")]
Column = Annotated[list[str] | None, typer.Option(help="A column's role: question=COLUMN. May be repeated.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data.")]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate.")]
Minutes = Annotated[float | None, typer.Option(help="Training budget in minutes.")]
Tokens = Annotated[int | None, typer.Option(help="Training budget in tokens.")]
MemoryGib = Annotated[float | None, typer.Option(help="Largest memory of training, in GiB.")]
Limit = Annotated[int | None, typer.Option(help="Use at most this many training records.")]
Output = Annotated[str | None, typer.Option(help="Folder that holds the runs.")]
Name = Annotated[str | None, typer.Option(help="Name of the run.")]
Seed = Annotated[int | None, typer.Option(help="Of everything random.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Let a hub model run code of its own.")]


def _recipe_options(
    train: Train = None,
    recipe: RecipeFile = None,
    base: Base = None,
    test: Test = None,
    target: Target = None,
    form: Form = None,
    parameters: Parameters = None,
    examples: Examples = None,
    policy: Policy = None,
    finish: Finish = None,
    benchmarks: Benchmarks = None,
    data_root: DataRoot = None,
    items: Items = None,
    column: Column = None,
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    minutes: Minutes = None,
    tokens: Tokens = None,
    memory_gib: MemoryGib = None,
    limit: Limit = None,
    output: Output = None,
    name: Name = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """What every command that takes data or a recipe can be told; :func:`takes_a_recipe` gives it to a command."""


def takes_a_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a recipe before its own: it is called with a dictionary of all of them, and its own by name."""
    shared, own = (
        list(inspect.signature(function, eval_str=True).parameters.values()) for function in (_recipe_options, command)
    )
    quiet = shared[-1]
    options = [*shared[:-1], *own[1:], quiet]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        own_values = {parameter.name: given.pop(parameter.name) for parameter in own[1:]}
        command(given, **own_values)

    called.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in options}
    del called.__wrapped__  # type: ignore[attr-defined]
    return called


@app.command()
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

    values = _values(options | {"require_retention": require_retention})
    run = pipeline.specialize(options["train"], recipe=options["recipe"], quiet=options["quiet"], **values)
    _finish(run, show_verdict)


@app.command()
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
        predicted = pipeline.plan(train, recipe=recipe, quiet=options["quiet"] or as_json, **_values(options))
    except KeyboardInterrupt:
        typer.echo("selectune: stopped; nothing is left behind", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        typer.echo(predicted.model_dump_json(indent=1))
    else:
        show_plan(predicted)
    if predicted.problems:
        raise typer.Exit(EXIT_OVER_BUDGET)


def _values(options: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe's values that the options of a command give, section by section."""
    given = {key: value for key, value in options.items() if value is not None}
    given["columns"] = pairs(given.pop("column", None))
    given["benchmarks"] = given["benchmarks"].split(",") if given.get("benchmarks") else None
    for flag in ("trust_remote_code", "require_retention"):
        given[flag] = given.get(flag) or None
    values: dict[str, Any] = {key: given[key] for key in _TOP if given.get(key) is not None}
    for section, keys in _SECTIONS.items():
        inside = {key: given[key] for key in keys if given.get(key) is not None}
        if inside:
            values[section] = inside
    return values


_TOP = ("base", "examples", "form", "parameters", "policy", "finish", "output", "name", "seed", "trust_remote_code")
_SECTIONS = {
    "data": ("test", "target", "columns", "limit"),
    "training": ("epochs", "learning_rate"),
    "budget": ("minutes", "tokens", "memory_gib"),
    "evaluation": ("benchmarks", "data_root", "items", "require_retention"),
}


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


@app.command()
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


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _finish(run: Any, show: Any) -> None:
    from selectune.pipeline import verdict_of

    show(run)
    if run.recipe.evaluation.require_retention and verdict_of(run).retained == "lost":
        raise typer.Exit(EXIT_LOST)


def pairs(given: list[str] | None) -> dict[str, str] | None:
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
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about their next versions: nobody here can mend them
    try:
        app()
    except UserError as error:
        print(f"selectune: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except MemoryError:
        print(
            "selectune: out of memory; to mend it: train with half the training.micro_batch_sequences, or take fewer records",
            file=sys.stderr,
        )
        sys.exit(EXIT_MISTAKE)
    except SystemExit as ended:
        if isinstance(
            getattr(ended.__context__, "__cause__", None), KeyboardInterrupt
        ):  # Ctrl-C, which typer makes a silent exit of
            print(
                "selectune: stopped; a run goes on with `selectune resume RUN`, and what --kept holds is not measured again",
                file=sys.stderr,
            )
        raise
    except Exception as error:
        if (why := unwritable(error)) is not None:
            print(f"selectune: {getattr(error, 'filename', None) or 'the disk'}: {why}; to mend it: free space or name another --output, "
                  "then `selectune resume`", file=sys.stderr)  # fmt: skip
            sys.exit(EXIT_MISTAKE)
        if type(error).__name__ != "Interrupted":
            raise
        print(f"selectune: {error}; go on with `selectune resume RUN` (see `selectune runs`)", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
