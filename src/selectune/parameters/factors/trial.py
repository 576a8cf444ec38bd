"""A short training on a copy of the base: what a choice of weights would do, tried.

Knows: how a copy is trained for a few steps on packed records with a selection of its weights, and how a loss on records is measured.
The base itself is never touched. Does not know: what is concluded from a trial.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selectune.errors import UserError
from selectune.parameters.factors.gradients import batch_of, rows_of
from selectune.parameters.selection import Selection
from selectune.progress import watched
from selectune.training.partial import train_entries

if TYPE_CHECKING:
    from selectune.data import Record
    from selectune.objectives.objective import Objective
    from selectune.parameters.method import Context


class Diverged(UserError):
    """The loss of a trial was not finite."""


@dataclass
class Trial:
    """A copy of the base after a short training."""

    model: Any
    trained: dict[str, Tensor]
    """What trained, fp32, by the name of the weight that it is part of."""
    start: dict[str, Tensor]
    """The same before training."""
    losses: list[float]
    """Of each step, nats per response token."""

    def change(self, name: str) -> Tensor:
        """Return how a weight's trained entries changed."""
        return self.trained[name].detach() - self.start[name]


def trial(
    context: Context,
    selection: Selection,
    *,
    records: Sequence[Record] | None = None,
    steps: int,
    learning_rate: float,
    batch: int = 2,
    optimiser: str = "adamw",
    clip: float = 1.0,
    objective: Objective | None = None,
    seed: int = 0,
    prepare: Callable[[Any], None] | None = None,
    before_step: Callable[[int, dict[str, Tensor]], None] | None = None,
    look: Callable[[int, Any], None] | None = None,
    look_after: Collection[int] = (),
) -> Trial:
    """Train a copy of the base for some steps on packed records (the training records) and return it.

    Args:
        selection: what trains. batch: packed sequences in a step. optimiser: ``adamw`` (no decay) or ``sgd``; linear decay to zero.
        clip: largest norm of the gradient. seed: of the order of the sequences. prepare: may change the copy before training (add modules, masks).
        before_step: gets the step and what trains, gradients in place, before each step.
        look: gets the number of steps done and the copy, to measure what it likes, after each of the numbers in ``look_after`` (0: before the
            first); training goes on as if nobody had looked.

    Raises:
        UserError: none of the records has anything to learn; :class:`Diverged`.
    """
    from selectune.objectives.cross_entropy import CrossEntropy
    from selectune.training.loss import LossOfModel

    model = copy.deepcopy(context.base.model)
    if prepare is not None:
        prepare(model)
    trained: dict[str, Tensor] = dict(train_entries(model, selection))
    trained |= {name: value for name, value in model.named_parameters() if value.requires_grad and not _is_part(value, trained)}
    start = {name: value.detach().clone() for name, value in trained.items()}
    rows = rows_of(context, context.train if records is None else records, packed=True)
    kind = torch.optim.SGD if optimiser == "sgd" else torch.optim.AdamW
    options: dict[str, Any] = {} if optimiser == "sgd" else {"weight_decay": 0.0, "fused": True}
    stepper = kind(list(trained.values()), lr=learning_rate, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: 1 - step / steps)
    whole = LossOfModel(model, objective or CrossEntropy(), in_bfloat16(context))
    context.meter.count(trainings=1)
    losses = []
    with ExitStack() as attending:
        attending.enter_context(whole.attending(rows))
        for step, members in zip(
            watched(range(steps), "a short training", context.quiet), _batches(len(rows), batch, seed), strict=False
        ):
            if look is not None and step in look_after:
                attending.close()  # to whoever looks the copy is an ordinary model
                look(step, model)
                attending.enter_context(whole.attending(rows))
            inputs = batch_of(model, [rows[member] for member in members])
            total = whole(**inputs)
            count = (inputs["labels"][:, 1:] != -100).sum().clamp(min=1)
            (total / count).backward()
            context.meter.count(forward=inputs["input_ids"].numel(), backward=inputs["input_ids"].numel())
            if before_step is not None:
                before_step(step, trained)
            torch.nn.utils.clip_grad_norm_(list(trained.values()), clip)
            stepper.step()
            schedule.step()
            stepper.zero_grad(set_to_none=True)
            losses.append(float(total.detach() / count))
            if not math.isfinite(losses[-1]):
                raise Diverged(f"a short training of the choice diverged at step {step + 1} of {steps}", field="parameters.learning_rate",
                               expected=f"less than {learning_rate:g}")  # fmt: skip
    if look is not None and steps in look_after:
        look(steps, model)
    return Trial(model, trained, start, losses)


def loss_on(context: Context, records: Sequence[Record], model: Any = None) -> float:
    """Return a model's (left out: the base's) mean loss on some records, in nats per response token."""
    from selectune.objectives.cross_entropy import CrossEntropy
    from selectune.training.loss import LossOfModel

    rows = rows_of(context, records, packed=True)
    model = context.base.model if model is None else model
    whole = LossOfModel(model, CrossEntropy(), in_bfloat16(context))
    total, count = 0.0, 0
    with torch.no_grad(), whole.attending(rows):
        for row in watched(rows, "measuring the loss", context.quiet):
            inputs = batch_of(model, [row])
            total += float(whole(**inputs))
            count += int((row["labels"][1:] != -100).sum())
            context.meter.count(forward=inputs["input_ids"].numel())
    return total / max(count, 1)


@contextmanager
def hooked(modules: dict[str, Any], hook: Callable[[str, Any, tuple[Any, ...], Any], Any]) -> Iterator[None]:
    """Within, call ``hook(name, module, inputs, output)`` after each of some modules; what it returns replaces the output."""
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: hook(name, module, inputs, output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Numbers of sequences, batch after batch, each epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += torch.randperm(count, generator=generator).tolist()
        yield queue[:size]
        queue = queue[size:]


def in_bfloat16(context: Context) -> bool:
    """Return whether a copy of the base computes by autocast: asked for, or needed where fp32 copies of weights meet a bf16 rest."""
    return context.bfloat16 or context.base.model.dtype == torch.bfloat16


def _is_part(value: Tensor, trained: dict[str, Tensor]) -> bool:
    return any(value is one for one in trained.values())
