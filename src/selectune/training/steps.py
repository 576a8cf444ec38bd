"""How long a training run will be, what goes through the model in it, and what its products cost.

Knows: steps from epochs and budgets, when a run evaluates and saves, which sequences meet a frozen beginning that is known, and
floating-point operations from the anatomy. All of it is arithmetic, ahead of the run. Does not know: how a step is run, or how long
it takes.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import psutil
import torch

from selectune.data.packing import LikeLengths
from selectune.errors import UserError
from selectune.meter import Cost
from selectune.models.head import SplitModel
from selectune.recipe import BudgetRecipe, TrainingRecipe
from selectune.training.partial import entries, multiplications
from selectune.training.prefix import MEMORY_SHARE, frozen_blocks

if TYPE_CHECKING:
    from selectune.models import Anatomy


@dataclass(frozen=True)
class Plan:
    """What training will do; written once, so that a resumed run does the same."""

    steps: int
    micro_batch_sequences: int
    """Packed sequences in one forward pass."""
    seconds: float | None = None
    """Predicted for the training alone; only for a budget in minutes."""


@dataclass(frozen=True)
class Passes:
    """The tokens that go through the model in a whole run, padding included, and the files that it writes."""

    trained: int
    """Tokens forward and backward, all epochs together."""
    trained_known: int
    """Of these, tokens whose way through the frozen first blocks was known."""
    evaluated: int
    evaluated_known: int
    checkpoints: int
    sequences: int
    """Forward and backward, all epochs together."""

    @property
    def cost(self) -> Cost:
        """What the meter will have counted."""
        return Cost(stage="train", forward_tokens=self.trained + self.evaluated, backward_tokens=self.trained)

    @property
    def known(self) -> int:
        """Tokens that skip the frozen first blocks."""
        return self.trained_known + self.evaluated_known


def plan_steps(
    sequences: int, tokens: int, recipe: TrainingRecipe, budget: BudgetRecipe, seconds: Callable[[int], float] | None = None
) -> int:
    """Return the number of optimiser steps: the smallest that epochs, ``max_steps`` and the budget allow.

    Args:
        sequences: packed sequences in one epoch. tokens: tokens in them.
        seconds: predicted seconds of a run of so many steps; used only with a budget in minutes.

    Raises:
        UserError: the budget does not reach for one step.
    """
    limits = [math.ceil(recipe.epochs * math.ceil(sequences / recipe.batch_sequences))]
    if recipe.max_steps:
        limits.append(recipe.max_steps)
    if budget.tokens:
        limits.append(int(budget.tokens / (tokens / sequences * recipe.batch_sequences)))
    if budget.minutes and seconds and min(limits) > 0:
        limits.append(bisect.bisect_right(range(1, min(limits) + 1), budget.minutes * 60, key=seconds))
    if min(limits) < 1:
        raise UserError("the budget does not reach for one step", field="budget",
                        mend="raise it, or lower training.batch_sequences or data.max_length")  # fmt: skip
    return min(limits)


def accumulation(recipe: TrainingRecipe, micro: int, processes: int) -> int:
    """Return how many forward passes of each process make a batch.

    Raises:
        UserError: the processes cannot share the batch evenly, or it is more than one pass and each parameter steps as soon as it can.
    """
    if processes > 1 and recipe.batch_sequences % (micro * processes):
        raise UserError(
            f"a batch of {recipe.batch_sequences} sequences cannot be shared by {processes} processes of {micro} at a time",
            field="training.batch_sequences", expected=f"a multiple of {micro * processes}",
        )  # fmt: skip
    passes = math.ceil(recipe.batch_sequences / (micro * processes))
    if recipe.step_in_backward and (processes > 1 or passes > 1 or recipe.clip_norm):
        raise UserError(
            "a parameter that steps as soon as its gradient is there knows no other micro-batch, process or norm of all gradients",
            field="training.step_in_backward", expected="one process, micro_batch_sequences equal to batch_sequences, clip_norm: null",
        )  # fmt: skip
    return passes


def intervals(recipe: TrainingRecipe, steps: int, dev_sequences: int) -> tuple[int | None, int]:
    """Return after how many steps a run evaluates (None: never) and saves."""
    evaluate = max(1, steps // recipe.evaluations) if recipe.evaluations and dev_sequences else None
    return evaluate, evaluate or recipe.save_steps or max(1, steps // 4)


def remembers(model: Any, recipe: TrainingRecipe, lengths: list[int]) -> bool:
    """Whether training computes a frozen beginning of the model once for each sequence; they must have one length."""
    able = recipe.prefix_cache and not recipe.gradient_checkpointing and len(set(lengths)) == 1
    return able and frozen_blocks(SplitModel(model).causal)[1] > 0


def rows_remembered(model: Any, rows: int, length: int, file_limit: int = 16 << 30) -> tuple[int, int]:
    """Return how many of ``rows`` sequences a frozen beginning is kept of, and the bytes that this takes of the model's own memory."""
    embedding = model.get_input_embeddings().weight
    each = length * embedding.shape[-1] * embedding.dtype.itemsize
    if each * rows <= psutil.virtual_memory().available * MEMORY_SHARE:
        return rows, each * rows if embedding.device.type == "cpu" else 0
    return min(rows, max(file_limit // each, 1)), 0  # in a file


def passes_of_steps(
    lengths: list[int], recipe: TrainingRecipe, micro: int, known: set[int], seed: int, room: int
) -> Iterator[tuple[int, int, int]]:
    """Yield for each optimiser step its sequences, its tokens, and those of them whose frozen beginning is known by then.

    Follows the order in which the trainer shuffles each epoch. A pass of fewer than ``micro`` sequences neither remembers nor is
    remembered.

    Args:
        lengths: tokens in each training sequence. micro: sequences in a pass. known: numbers of the sequences that are known;
            grows. room: sequences that can be.
    """
    accumulation = math.ceil(recipe.batch_sequences / micro)
    alike = LikeLengths(lengths, micro, seed) if len(set(lengths)) > 1 else None
    epoch = 0
    while True:
        if alike is not None:
            alike.set_epoch(epoch)
            order = list(alike)
        else:
            order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        passes = [order[start : start + micro] for start in range(0, len(order), micro)]
        for start in range(0, len(passes), accumulation):
            met = [_meets(rows, lengths, micro, known, room) for rows in passes[start : start + accumulation]]
            yield sum(map(len, passes[start : start + accumulation])), sum(m[0] for m in met), sum(m[1] for m in met)
        epoch += 1


def _meets(rows: list[int], lengths: list[int], micro: int, known: set[int], room: int) -> tuple[int, int]:
    """Return the tokens of a pass, and those of them that skip the frozen beginning; remember its sequences if none does."""
    tokens = len(rows) * max(lengths[row] for row in rows)
    if len(rows) < micro or not room:
        return tokens, 0
    if known.issuperset(rows):
        return tokens, tokens
    known.update(row for row in rows if row < room)
    return tokens, 0


def passes(
    lengths: list[int], dev_lengths: list[int], recipe: TrainingRecipe, micro: int, steps: int, seed: int, room: int
) -> Passes:
    """Return what goes through the model in a run of so many steps.

    Args:
        lengths, dev_lengths: tokens in each sequence. micro: sequences in a forward pass. room: sequences whose frozen beginning
            can be kept; 0 where there is none.
    """
    evaluate, save = intervals(recipe, steps, len(dev_lengths))
    every, known = [*lengths, *dev_lengths], set[int]()
    dev = range(len(lengths), len(every))
    dev_passes = [list(dev[start : start + micro]) for start in range(0, len(dev), micro)]
    trained = skipped = evaluated = evaluated_skipped = checkpoints = sequences = 0
    for step, (count, tokens, known_tokens) in enumerate(
        islice(passes_of_steps(lengths, recipe, micro, known, seed, room), steps), start=1
    ):
        sequences, trained, skipped = sequences + count, trained + tokens, skipped + known_tokens
        if evaluate and (step % evaluate == 0 or step == steps):
            for rows in dev_passes:
                tokens, known_tokens = _meets(rows, every, micro, known, room)
                evaluated, evaluated_skipped = evaluated + tokens, evaluated_skipped + known_tokens
        checkpoints += step % save == 0 or step == steps or bool(recipe.save_steps and step % recipe.save_steps == 0)
    return Passes(trained, skipped, evaluated, evaluated_skipped, checkpoints, sequences)


def flops(anatomy: Anatomy, model: Any, cost: Cost, skipped_tokens: int = 0) -> float:
    """Return the floating-point operations of a training run's matrix products with weights.

    Per token: 2 for each block weight forward; 2 more for each weight at or above the lowest trained block, for the gradient of its
    input; and 2 for each trained weight (of a part of a matrix, for each entry of the product that gives its gradient). The head and
    attention's own products are left out, and the blocks below the lowest trained one for tokens that skipped them.

    Args:
        cost: with the tokens that went through the model, or, ahead of the run, those of :attr:`Passes.cost`.
    """
    trained = {name for name, value in model.named_parameters() if value.requires_grad} | entries(model).keys()
    counts = [sum(_size(anatomy, name) for name in block.parameters) for block in anatomy.blocks]
    touched = {index for name in trained if (index := anatomy.block_of(name)) is not None}
    lowest = 0 if not touched or any(name in trained for name in anatomy.embeddings) else min(touched)
    weights = multiplications(model)
    forward = cost.forward_tokens * sum(counts) - skipped_tokens * sum(counts[:lowest])
    return 2.0 * (forward + cost.backward_tokens * (sum(counts[lowest:]) + weights))


def _size(anatomy: Anatomy, name: str) -> int:
    return anatomy.sizes.get(name, 0)
