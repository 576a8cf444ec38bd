"""The pieces of work of a cell: prepare the data, measure the base, choose, train, measure.

Knows: which stages of the pipeline each piece is made of. Every piece runs in a process of its own with the base in memory, may
change it at will, and leaves files. Does not know: which pieces are wanted, or in what order.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from selectune import pipeline
from selectune.errors import UserError
from selectune.experiment.budget import Fitted, fit_knob, fit_rank
from selectune.experiment.planting import Account
from selectune.experiment.pools import PlantedPool, build
from selectune.experiment.protocol import ENDLESS, Task
from selectune.experiment.store import CHOSEN, Choice, Measured, Piece, Trial
from selectune.meter import Cost, Meter
from selectune.pipeline import Chain
from selectune.pipeline.finishing import specialist
from selectune.recipe import DataRecipe, Recipe
from selectune.run import Benchmark, Run, folder_atomically

if TYPE_CHECKING:
    from selectune.models import Base

SPLITS = ("train", "dev", "test")
RECORDS, PLANTED = "chosen.jsonl", "planted.json"


def prepare(task: Task, data: DataRecipe, folder: Path, pool: PlantedPool | None = None) -> Piece:
    """Write a task's records, each split cut to its size by hash of the content; with a pool, its records are those that may train.

    Raises:
        UserError: a mistake in the data, or no development or test records, without which nothing can be tuned or measured.
    """
    from selectune.data import prepare as prepared_of
    from selectune.data import records_to_file

    prepared = prepared_of(data)
    with folder_atomically(folder) as making:
        for split in SPLITS:
            records = sorted(getattr(prepared, split), key=lambda record: record.key)[: getattr(task, f"{split}_records")]
            if pool is not None and split == "train":
                records, account = build(pool, prepared.train, {"target": [record.question for record in prepared.test]})
                (making / PLANTED).write_text(account.model_dump_json(indent=1), encoding="utf-8")
            if not records:
                raise UserError(f"no {split} records are left", field=f"tasks.{split}_records")
            prepared.summary.splits[split] = len(records)
            records_to_file(records, making / f"{split}.jsonl")
        (making / "data.json").write_text(prepared.summary.model_dump_json(indent=1), encoding="utf-8")
    return Piece()


def open_run(folder: Path, recipe: Recipe, data: Path) -> Run:
    """Make a run folder whose data are those of the task, or take one up again."""
    try:
        run = Run.create(folder, recipe)
    except UserError:  # begun by a version that wrote the same recipe in other words
        shutil.rmtree(folder)
        run = Run.create(folder, recipe)
    run.path("data").mkdir(exist_ok=True)
    for split in SPLITS:
        _link(data / f"{split}.jsonl", run.path("data", f"{split}.jsonl"))
    if not run.has("data.json"):
        shutil.copyfile(data / "data.json", run.path("data.json"))
    return run


def measure_base(recipe: Recipe, task: Task, data: Path, base: Base, room: Path) -> Measured:
    """Measure the base on a task and on what should not be lost."""
    from selectune.evaluation import measure_forgetting

    chain = Chain(open_run(room, recipe, data), recipe, quiet=True, loaded=base)
    before, _ = measure_forgetting(base.model, base.model, base.tokenizer, bfloat16=chain.bfloat16)
    return Measured(benchmarks=[*_target(chain, task, base.model, base), *map(_bare, before)])


def choose(
    recipe: Recipe, data: Path, base: Base, room: Path, fitted: Fitted, library: Path | None = None, kept: Any = None
) -> Choice:
    """Choose records and entries, within the budget; only the choice itself is metered, not the tries that find the hyper-parameter it needs.

    Args:
        library: signals of the task's records that other choices measured. kept: likewise, scores of weights, by choices in this process.
            Their cost is counted as if this one had measured them.
    """
    from selectune.examples import Pool
    from selectune.examples.factors.store import chosen_keys
    from selectune.parameters import Selection

    if fitted.knob is not None and fitted.entries is not None:
        trying = Chain(open_run(room / "trying", recipe, data), recipe, quiet=True, loaded=base, kept=kept)

        def count(parameters: Any) -> int:
            own = replace(base, model=copy.deepcopy(base.model))
            return trying.form.count(own, parameters.select(trying.context(own, Meter("choose"))))  # type: ignore[no-any-return]

        within = fit_knob(trying.parameters, fitted.knob, fitted.entries, count)
        recipe = recipe.model_copy(update={"parameters": within.describe()})
    chain = Chain(open_run(room / "chosen", recipe, data), recipe, quiet=True, loaded=base, library=library, kept=kept)
    pipeline.choose_examples(chain)
    pipeline.choose(chain)
    selection, form = Selection.load(chain.run.path(CHOSEN)), chain.form
    if fitted.knob is None and fitted.entries is not None:
        form = fit_rank(form, base, selection, fitted.entries)
    _link(chain.run.path(CHOSEN), room / CHOSEN)
    if chain.run.has(f"data/{RECORDS}"):
        _link(chain.run.path("data", RECORDS), room / RECORDS)
    costs = [cost for cost in chain.run.costs() if cost.stage in ("choose_examples", "choose")]
    records = chain.records("train")
    planted = data / PLANTED
    account = Account.model_validate_json(planted.read_bytes()) if planted.exists() else Account()
    scores = chain.run.path("scores.parquet")  # a record that the choice changed counts as what it was
    keys = chosen_keys(scores) if scores.exists() else [record.key for record in records]
    return Choice(
        parameters=chain.parameters.describe(), form=form.describe(), entries=form.count(base, selection), cost=reduce(Cost.after, costs),
        records=len(records), tokens=int(Pool(records, lambda: base, chain.encoder).tokens.sum()),
        kept=account.kept(keys),
    )  # fmt: skip


def train(recipe: Recipe, data: Path, base: Base, room: Path, chosen: Path) -> Trial:
    """Train at one learning rate; the specialist stays in ``room`` and what only a resumed training needs is removed."""
    run = open_run(room, recipe, data)
    _link(chosen, run.path(CHOSEN))
    if (chosen.parent / RECORDS).exists():
        _link(chosen.parent / RECORDS, run.path("data", RECORDS))
    settings = recipe.training
    if settings.epochs == ENDLESS and settings.micro_batch_sequences != "auto":  # nothing is left to be planned
        run.write("plan.json", {"steps": settings.max_steps, "micro_batch_sequences": settings.micro_batch_sequences})
    chain = Chain(run, recipe, quiet=True, loaded=base)
    pipeline.train(chain)
    pipeline.finish(chain)
    steps, loss, step_seconds = _result(run)
    if loss is None or not math.isfinite(loss):
        raise UserError(f"the development loss is {loss}", field="learning_rates")
    for rest in ("checkpoints", "prefix"):
        shutil.rmtree(run.path(rest), ignore_errors=True)
    return Trial(learning_rate=recipe.training.learning_rate or 0.0, dev_loss=loss, steps=steps,
                 entries=count_values(run.path("specialist")), cost=reduce(Cost.after, run.costs()), step_seconds=step_seconds)  # fmt: skip


def measure(recipe: Recipe, task: Task, base: Base, room: Path, known: list[Benchmark]) -> list[Benchmark]:
    """Measure the specialist of a trial, as it is on disk."""
    from selectune.evaluation import measure_forgetting

    chain = Chain(Run.open(room), recipe, quiet=True, loaded=replace(base, model=copy.deepcopy(base.model)))
    _, model = specialist(chain)
    _, after = measure_forgetting(base.model, model, base.tokenizer, bfloat16=chain.bfloat16, known=known)
    return [*_target(chain, task, model, base), *map(_bare, after)]


def _result(run: Run) -> tuple[int, float | None, float]:
    """Return what a training stage left: steps, the development loss, and the seconds of a step."""
    values = json.loads(run.path("training.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = [line["seconds"] for line in lines if "seconds" in line]
    return values["steps"], values["dev_loss"], timed[-1] / values["steps"] if timed else 0.0


def count_values(folder: Path) -> int:
    """Return how many values the tensors of a specialist hold, the places of parts not counted."""
    total = 0
    for file in folder.glob("*.safetensors"):
        if file.name != CHOSEN:
            with safe_open(file, framework="pt") as opened:
                total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total


def _target(chain: Chain, task: Task, model: Any, base: Base) -> list[Benchmark]:
    from selectune.evaluation import Scorer, evaluate_target

    metric = next((metric for metric in task.metrics if metric != "loss"), "perplexity")
    scorer = Scorer(model, base.tokenizer, bfloat16=chain.bfloat16)
    found = evaluate_target(chain.records("test"), metric, scorer, chain.encoder(base.tokenizer), task.max_new_tokens, None)
    return [_bare(benchmark) for benchmark in found]


def _bare(benchmark: Benchmark) -> Benchmark:
    items = [item.model_copy(update={"prompt": "", "target": "", "prediction": ""}) for item in benchmark.items]
    return benchmark.model_copy(update={"items": items})


def _link(source: Path, place: Path) -> None:
    if place.exists():
        return
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)
