"""What a training run will take on this machine, told after ten seconds of it.

Knows: how to run a few real steps of the real trainer, with everything that goes with them, and to add up a whole run from what each
part took. Does not know: what the memory is made of (``memory.py``) or how many sequences go through the model (``steps.py``).
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import TrainerCallback

from selectune.errors import UserError
from selectune.meter import Meter
from selectune.recipe import BudgetRecipe, Recipe, TrainingRecipe
from selectune.run import write_atomically
from selectune.training import processes
from selectune.training.memory import Footprint, memory_limit, memory_problem, micro_batch
from selectune.training.policies.none import Nothing
from selectune.training.steps import (
    Passes,
    Plan,
    accumulation,
    flops,
    passes,
    passes_of_steps,
    plan_steps,
    remembers,
    rows_remembered,
)
from selectune.training.trainable import Trainable
from selectune.training.trainer import WEIGHTS, Interrupted, load_trained_tensors, train

if TYPE_CHECKING:
    from selectune.models import Anatomy

SECONDS = 10.0
"""Of steps that are watched, at least; and at least the three or four kinds of step that there are."""
MOST_STEPS = 8


class Prediction(BaseModel):
    """What a run will be and take, before it is run."""

    base: str
    form: dict[str, Any]
    parameters: dict[str, Any]
    trained_parameters: int
    total_parameters: int
    sequences: int
    """Packed, in one epoch."""
    tokens: int
    """In the training records, once each; padding not counted."""
    response_tokens: int
    steps: int
    epochs: float
    """Passes over the training records in these steps."""
    micro_batch_sequences: int
    training_tokens: int
    """Through the model forward and backward, padding included."""
    flops: float
    """Of the training's matrix products with weights."""
    memory_bytes: int
    """Largest resident memory during training."""
    memory_measured: bool
    """Whether real steps were measured; they are not run where the count says that they cannot fit."""
    memory_parts: dict[str, int]
    """What the memory holds, counted."""
    saved_by: dict[str, int]
    """What a forward pass keeps for the backward pass, for one packed sequence, by the kind of module that keeps it."""
    memory_limit_bytes: int
    seconds: float | None
    """Of the training stage, the loading of the base included; None where no steps were run."""
    seconds_of_choosing: float
    """Of choosing the weights to train."""
    tokens_per_second: float | None
    """While steps run, all the training's tokens by all its steps."""
    minutes_budget: float | None
    steps_in_budget: int
    """Steps that a budget in minutes leaves of ``steps``."""
    problems: list[str]
    """Why this exceeds the budget, and what would mend it; empty when it does not."""
    notes: list[str]
    """What the prediction assumes."""


@dataclass(frozen=True)
class Calibration:
    """What the parts of a run took, in seconds."""

    start: float
    """From the call to the first step."""
    warm_up: float
    """What the first step took more than a later one."""
    token: float
    """One token forward and backward."""
    known_token: float
    """The same when its way through the frozen first blocks is known."""
    step: float
    """The optimiser, once the gradients are there."""
    evaluated: float
    """One token of a development sequence."""
    evaluated_known: float
    checkpoint: float
    finish: float
    """Loading the best checkpoint and writing the specialist."""
    peak_memory_bytes: int
    remembered: int
    """Sequences whose hidden states were kept meanwhile."""

    def seconds(self, passes: Passes, steps: int) -> float:
        """Return the seconds of a whole run."""
        return self.start + self.warm_up + self.finish + self.of_steps(passes, steps) + (
            (passes.evaluated - passes.evaluated_known) * self.evaluated
            + passes.evaluated_known * self.evaluated_known
            + passes.checkpoints * self.checkpoint
        )  # fmt: skip

    def of_steps(self, passes: Passes, steps: int) -> float:
        """Return the seconds of its steps alone."""
        return (passes.trained - passes.trained_known) * self.token + passes.trained_known * self.known_token + steps * self.step


def calibrate(
    made: Trainable, recipe: TrainingRecipe, save: Callable[[Path], Any] = lambda folder: None, seconds: float = SECONDS
) -> Calibration:
    """Run a few steps of the real trainer at a learning rate of zero, and time their parts; the weights stay as they were.

    (Not with every policy: some move weights of themselves.)

    A step here has at most two passes and the sequences are a sample, evenly spread, as many as there may be steps over new ones: sizes of
    records that no step has met take longer. The first step warms up; then come steps over sequences that are new and, where the
    frozen beginning is kept, over known ones; an evaluation of each kind; one checkpoint.

    Args:
        made: a temporary folder is made in its folder. recipe: with a number of ``micro_batch_sequences``.
        save: writes the specialist into a folder.
    """
    micro = recipe.micro_batch_sequences
    assert micro != "auto"
    batch = micro * min(2, math.ceil(recipe.batch_sequences / micro))
    short = recipe.model_copy(
        update={"batch_sequences": batch, "evaluations": 0, "save_steps": None, "save_minutes": None, "report_to": []}
    )
    kept = remembers(made.model, recipe, made.lengths)
    rows = _spread(made.train_rows, (MOST_STEPS // 2 if kept else MOST_STEPS) * batch)
    dev = _spread(made.dev_rows, 2 * micro) if recipe.evaluations else []
    room = len(rows) + len(dev) if kept else 0
    least = math.ceil(len(rows) / batch) + 2 if kept else 2
    watch = _Watch(kept, bool(dev), seconds, least)
    for left in made.folder.glob(".calibration-*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=made.folder, prefix=".calibration-") as place, Meter("calibration") as meter:
        tried = replace(made, train_rows=rows, dev_rows=dev, folder=Path(place))
        begin = time.perf_counter()
        try:
            train(tried, short, steps=1000, learning_rate=0.0, meter=meter, quiet=True, watching=[watch])
        except Interrupted:
            raise KeyboardInterrupt from None
        end = time.perf_counter()
        if recipe.keep_best and dev:
            load_trained_tensors(made.model, next(tried.checkpoints.glob("checkpoint-*")) / WEIGHTS)
        specialist = tried.folder / "specialist"
        specialist.mkdir()
        save(specialist)
        finish = time.perf_counter() - end
    made.model.zero_grad(set_to_none=True)
    seen = list(islice(passes_of_steps(tried.lengths, short, micro, set(), made.seed, room), len(watch.steps)))
    each = [step.passes / tokens for step, (_, tokens, _) in zip(watch.steps, seen, strict=True)]
    fresh = [value for value, (_, _, known) in zip(each, seen, strict=True) if not known]
    known = [value for value, (_, tokens, known) in zip(each, seen, strict=True) if known == tokens]
    usual = fmean(fresh[1:] or fresh)
    optimiser = fmean([step.optimiser for step in watch.steps[1:]])
    first = watch.steps[0]
    halves = tried.dev_lengths[:micro], tried.dev_lengths[micro:]
    dev_tokens = sum(len(half) * max(half) for half in halves if half)
    evaluated = [value / dev_tokens for value in watch.evaluations]
    return Calibration(
        start=watch.begin - begin,
        warm_up=max(0.0, first.passes + first.optimiser - seen[0][1] * usual - optimiser),
        token=usual,
        known_token=fmean(known) if known else usual,
        step=optimiser,
        evaluated=evaluated[0] if evaluated else 0.0,
        evaluated_known=evaluated[-1] if evaluated else 0.0,
        checkpoint=watch.checkpoint,
        finish=finish,
        peak_memory_bytes=meter.cost.peak_memory_bytes,
        remembered=room,
    )


def plan(made: Trainable, recipe: Recipe) -> Plan:
    """Return the plan of a run, from ``plan.json`` in its folder when it was made before.

    Raises:
        UserError: the run would need more memory than it may have, or the budget does not reach for one step.
    """
    file = made.folder / "plan.json"
    if file.exists():
        return Plan(**json.loads(file.read_text(encoding="utf-8")))
    footprint = Footprint.of(made, recipe.training)
    micro = micro_batch(footprint, recipe.training, recipe.budget)
    accumulation(recipe.training, micro, max(recipe.training.processes, processes.count()))
    problem = memory_problem(footprint, recipe.training, recipe.budget, micro)
    if problem:
        raise problem
    if recipe.budget.minutes and processes.count() > 1:
        raise UserError("a budget in minutes is planned by one process", field="budget.minutes",
                        mend="start one process and set training.processes")  # fmt: skip
    settings = recipe.training.model_copy(update={"micro_batch_sequences": micro})
    predicted = None
    if recipe.budget.minutes:
        moves = not isinstance(made.policy, Nothing)  # some move weights of themselves
        calibration = calibrate(replace(made, model=copy.deepcopy(made.model)) if moves else made, settings)
        predicted = forecast(calibration, made, settings)
    steps = plan_steps(len(made.train_rows), made.tokens, settings, recipe.budget, predicted)
    found = Plan(steps, micro, predicted(steps) if predicted else None)
    write_atomically(file, json.dumps(asdict(found)))
    return found


def predict(
    made: Trainable,
    recipe: Recipe,
    *,
    anatomy: Anatomy,
    save: Callable[[Path], Any],
    loading: float,
    choosing: float,
    form: dict[str, Any],
    parameters: dict[str, Any],
    tokens: dict[str, int],
    notes: list[str],
) -> Prediction:
    """Return what a run will be and take.

    Args:
        made: some policies leave its model changed. anatomy: of its base.
        save: writes the specialist into a folder.
        loading, choosing: seconds that these took and will take again. form, parameters: as a recipe writes them.
        tokens: the account of the training records. notes: what was assumed so far.
    """
    footprint = Footprint.of(made, recipe.training)
    micro = micro_batch(footprint, recipe.training, recipe.budget)
    settings = recipe.training.model_copy(update={"micro_batch_sequences": micro})
    sequences = len(made.train_rows)
    steps = plan_steps(sequences, made.tokens, settings, recipe.budget)
    ahead = passes_ahead(made, settings, steps)
    memory, limit = footprint.at(settings, micro), memory_limit(recipe.budget)
    problems = [problem for problem in [memory_problem(footprint, settings, recipe.budget, micro)] if problem]
    needed, seconds, speed, within = memory.total, None, None, steps
    if memory.total <= memory_limit(BudgetRecipe()):  # else the machine would be out of memory
        calibration = calibrate(made, settings, save)
        needed = peak_memory(calibration, made)
        problems = problems or [p for p in [memory_problem(footprint, settings, recipe.budget, micro, needed)] if p]
        seconds = loading + calibration.seconds(ahead, steps)
        speed = ahead.trained / calibration.of_steps(ahead, steps)
        predicted = forecast(calibration, made, settings)
        if recipe.budget.minutes and predicted(steps) > recipe.budget.minutes * 60:
            problem, within = _too_long(recipe, sequences, steps, predicted)
            problems.append(problem)
    if settings.early_stop:
        notes = [*notes, "training.early_stop may end the run earlier"]
    every = getattr(made.policy, "every", None)
    if isinstance(every, int) and every > MOST_STEPS:
        notes = [*notes, f"what the policy does every {every} steps is not in it"]
    if settings.processes > 1:
        notes = [*notes, f"time and memory are those of one process; {settings.processes} would train together"]
    return Prediction(
        base=recipe.base,
        form=form,
        parameters=parameters,
        trained_parameters=footprint.trained,
        total_parameters=anatomy.total_parameters,
        sequences=sequences,
        tokens=tokens["all"],
        response_tokens=tokens["response"],
        steps=steps,
        epochs=round(ahead.sequences / sequences, 2),
        micro_batch_sequences=micro,
        training_tokens=ahead.trained,
        flops=flops(anatomy, made.model, ahead.cost, ahead.known),
        memory_bytes=needed,
        memory_measured=seconds is not None,
        memory_parts=asdict(memory),
        saved_by=footprint.saved_by,
        memory_limit_bytes=limit,
        seconds=seconds,
        seconds_of_choosing=choosing,
        tokens_per_second=speed,
        minutes_budget=recipe.budget.minutes,
        steps_in_budget=within,
        problems=[str(problem) for problem in problems],
        notes=notes,
    )


def _too_long(recipe: Recipe, sequences: int, steps: int, predicted: Callable[[int], float]) -> tuple[UserError, int]:
    """Return what to say of a run that would take longer than its budget, and the steps that the budget leaves."""
    minutes = predicted(steps) / 60
    assert recipe.budget.minutes is not None
    try:
        within = plan_steps(sequences, sequences, recipe.training, BudgetRecipe(minutes=recipe.budget.minutes), predicted)
    except UserError as error:
        return error, 0
    within = min(steps, within)
    epochs = recipe.training.epochs * within / steps
    problem = UserError(
        f"training would take {minutes:.1f} minutes and the budget is {recipe.budget.minutes:g}; a run would end after {within} of "
        f"{steps} steps",
        field="budget.minutes",
        mend=f"set it to {math.ceil(minutes * 1.1)}, or training.epochs: {max(epochs, 0.1):.1f}",
    )
    return problem, within


def forecast(calibration: Calibration, made: Trainable, recipe: TrainingRecipe) -> Callable[[int], float]:
    """Return a function from a number of steps to the predicted seconds of a run of that many."""

    def seconds(steps: int) -> float:
        return calibration.seconds(passes_ahead(made, recipe, steps), steps)

    return seconds


def passes_ahead(made: Trainable, recipe: TrainingRecipe, steps: int) -> Passes:
    """Return what will go through the model."""
    micro = recipe.micro_batch_sequences
    assert micro != "auto"
    lengths, dev_lengths, model = made.lengths, made.dev_lengths, made.model
    room = rows_remembered(model, len(lengths) + len(dev_lengths), lengths[0])[0] if remembers(model, recipe, lengths) else 0
    return passes(lengths, dev_lengths, recipe, micro, steps, made.seed, room)


def peak_memory(calibration: Calibration, made: Trainable) -> int:
    """Return the predicted peak of a whole run: what the calibration reached, and hidden states that it had no sequences for."""
    if not calibration.remembered:
        return calibration.peak_memory_bytes
    sequences, length = len(made.train_rows) + len(made.dev_rows), made.lengths[0]
    share = 1 - min(1.0, calibration.remembered / sequences)
    return calibration.peak_memory_bytes + round(rows_remembered(made.model, sequences, length)[1] * share)


def _spread(rows: list[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """Return at most so many, at even distances."""
    count = min(count, len(rows))
    return [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]


@dataclass
class _Step:
    passes: float
    """Seconds forward and backward, with clipping."""
    optimiser: float


@dataclass
class _Watch(TrainerCallback):
    """Notes what each part of a step took, and ends training when every kind of step was seen."""

    remembers: bool
    evaluates: bool
    seconds: float
    least: int
    """Steps until each kind was seen."""
    steps: list[_Step] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    checkpoint: float = 0.0
    begin: float = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = self._last = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._passes = self._lap()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(_Step(self._passes, self._lap()))
        done = len(self.steps)
        enough = done >= self.least
        enough = enough and (time.perf_counter() - self.begin >= self.seconds or done >= MOST_STEPS)
        control.should_evaluate = self.evaluates and done in ((2, 3) if self.remembers else (2,))
        control.should_save = control.should_training_stop = enough

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        passed = self._lap()
        if "eval_loss" in (logs or {}):
            self.evaluations.append(passed)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.checkpoint = self._lap()

    def _lap(self) -> float:
        if torch.cuda.is_available():  # it is told what to do, and does it later
            torch.cuda.synchronize()
        last, self._last = self._last, time.perf_counter()
        return self._last - last
