"""The chain: prepare, measure base, choose, train, finish, measure specialist, judge, report.

Knows: the order of the stages, and the folder of a run. Does not know: how any stage does its work; every folder of the package answers
its own question, and the files of this one say what each stage reads and writes.

Three doors lead here: :func:`specialize` from Python, ``selectune specialize`` and a recipe file. :func:`plan` goes through the same
chain as far as training, and tells what it would take.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectune import recipe as recipes
from selectune.errors import UserError
from selectune.pipeline.chain import Chain
from selectune.pipeline.choosing import choose, choose_examples
from selectune.pipeline.finishing import finish
from selectune.pipeline.measuring import judge, measure_base, measure_specialist, report
from selectune.pipeline.predicting import predict
from selectune.pipeline.preparing import prepare
from selectune.pipeline.training import train
from selectune.recipe import Recipe
from selectune.run import Run, Verdict

if TYPE_CHECKING:
    from selectune.training import Prediction

STAGES = (prepare, measure_base, choose_examples, choose, train, finish, measure_specialist, judge, report)


def specialize(
    train: str | Path | list[str] | None = None,
    *,
    recipe: str | Path | Recipe | dict[str, Any] | None = None,
    folder: str | Path | None = None,
    quiet: bool = False,
    **values: Any,
) -> Run:
    """Turn a base model into a specialist, and prove what was kept.

    Args:
        train: a file, folder, glob or hub id of training records (``data.train`` of the recipe).
        recipe: a recipe file, a :class:`Recipe` or its values; ``values`` override its keys.
        folder: the run folder; left out, a new one in the recipe's ``output``.
        quiet: show no progress.
        values: recipe keys, such as ``form="lora"`` or ``training={"epochs": 5}``.

    Returns:
        The finished run; ``run.read("verdict.json", Verdict)`` is the result, ``run.path("specialist")`` the model.

    Raises:
        UserError: a mistake in the input. Interrupted: Ctrl-C during training; go on with :func:`resume`.
    """
    from selectune.training import processes

    resolved = _resolve(train, recipe, values)
    place = processes.agree(str(folder or free_folder(resolved)))
    if processes.first():
        Run.create(place, resolved)
    processes.wait()
    return execute(Run.open(place), quiet)


def plan(
    train: str | Path | list[str] | None = None,
    *,
    recipe: str | Path | Recipe | dict[str, Any] | None = None,
    quiet: bool = False,
    **values: Any,
) -> Prediction:
    """Say what a run would train and take on this machine, after preparing its data and about ten seconds of real steps.

    Args:
        train, recipe, values: as in :func:`specialize`. quiet: show nothing of the data.

    Returns:
        Counts, floating-point operations, memory and time of the training, and under ``problems`` why they exceed the budget, if
        they do. No run is left behind. Measuring base and specialist is not part of it.

    Raises:
        UserError: a mistake in the input.
    """
    resolved = _resolve(train, recipe, values)
    output = Path(resolved.output).absolute()
    place = next(folder for folder in (output, *output.parents) if folder.is_dir())  # the disk that the run will write to
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".plan-") as folder:
            return predict(Chain(Run.create(folder, resolved), resolved, quiet))
    except PermissionError as error:
        raise UserError(f"cannot be written ({error.strerror})", file=place, mend="name another --output") from None


def _resolve(train: Any, recipe: str | Path | Recipe | dict[str, Any] | None, values: dict[str, Any]) -> Recipe:
    """Return the recipe that some values on top of a given one make."""
    if isinstance(recipe, Recipe | dict):
        given = recipe.model_dump() if isinstance(recipe, Recipe) else recipe
    else:
        given = recipes.read_values(recipe) if recipe else {}
    given = merge(given, values)
    if train is not None:
        given = merge(given, {"data": {"train": [str(item) for item in train] if isinstance(train, list) else str(train)}})
    resolved = recipes.parse(given, recipe if isinstance(recipe, str | Path) else None)
    if resolved.data.train is None:
        raise UserError("no training data", field="data.train", expected="a file, folder, glob or hub id")
    return resolved


def resume(folder: str | Path, quiet: bool = False) -> Run:
    """Take up a run where it was left; finished stages are skipped, training goes on from its last checkpoint."""
    return execute(Run.open(folder), quiet)


def execute(run: Run, quiet: bool = False) -> Run:
    """Run every stage that is not finished."""
    from selectune.training import processes

    chain = Chain(run, run.recipe, quiet or not processes.first())
    for stage in STAGES:
        stage(chain)
    return run


def merge(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``values`` with ``over`` put on top, section by section."""
    merged = dict(values)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and "method" not in value
        merged[key] = merge(merged[key], value) if both else value
    return merged


def free_folder(recipe: Recipe) -> Path:
    """Return the folder for a recipe's run: an unfinished run of the same recipe, or a new one."""
    if recipe.name:
        return Path(recipe.output) / recipe.name
    first = recipe.data.train if isinstance(recipe.data.train, str) else (recipe.data.train or ["run"])[0]
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(first).name.split(".")[0]).strip("-").lower() or "run"
    parts = [stem, *(c if isinstance(c, str) else str(c["method"]) for c in (recipe.form, recipe.parameters))]
    name = "-".join(part.split(":")[0] for part in parts if part != "all")
    for number in range(1, 10_000):
        folder = Path(recipe.output) / (name if number == 1 else f"{name}-{number}")
        run = Run(folder)
        if not folder.exists() or (run.has("recipe.yaml") and run.recipe == recipe and not run.finished("report")):
            return folder
    raise UserError("10,000 runs of this name exist", file=recipe.output, mend="give the run a name with --name")


def verdict_of(run: Run) -> Verdict:
    """Return a finished run's verdict."""
    return run.read("verdict.json", Verdict)
