"""Options that several commands share, and a recipe's values that they give.

Knows: how an option is spelled, what its help says, which key of a recipe it stands for. Does not know: any command.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from selectune.errors import UserError

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


def recipe_values(options: dict[str, Any]) -> dict[str, Any]:
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


def pairs(given: list[str] | None) -> dict[str, str] | None:
    if not given:
        return None
    for text in given:
        if "=" not in text:
            raise UserError(f"'{text}' is not role=column", field="--column", expected="for instance question=Question")
    return dict(text.split("=", 1) for text in given)  # type: ignore[misc]
