"""How long a training run will be, and what its products cost.

Knows: steps from epochs and budgets (measured once and kept, so that a resumed run has the same number), and floating-point
operations from the anatomy. Does not know: how a step is run.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from selectune.errors import UserError
from selectune.meter import Cost
from selectune.models.attention import attend_by_record, record_spans
from selectune.models.head import SplitModel
from selectune.objectives.objective import Objective
from selectune.recipe import BudgetRecipe, Recipe, TrainingRecipe
from selectune.run import write_atomically
from selectune.training.allocator import keep_freed_memory

if TYPE_CHECKING:
    from selectune.models import Anatomy


@dataclass(frozen=True)
class Plan:
    """What training will do."""

    steps: int
    seconds_per_step: float | None
    """Measured only for a budget in minutes."""


def plan(
    model: nn.Module, rows: list[dict[str, Tensor]], recipe: Recipe, objective: Objective, bfloat16: bool, file: Path
) -> Plan:
    """Return the plan, from ``file`` when it was made before."""
    if file.exists():
        return Plan(**json.loads(file.read_text(encoding="utf-8")))
    seconds = None
    if recipe.budget.minutes:
        seconds = measure_seconds_per_step(model, rows, recipe.training, objective, bfloat16)
    tokens = sum(len(row["input_ids"]) for row in rows)
    made = Plan(plan_steps(len(rows), tokens, recipe.training, recipe.budget, seconds), seconds)
    write_atomically(file, json.dumps(asdict(made)))
    return made


def plan_steps(
    sequences: int, tokens: int, recipe: TrainingRecipe, budget: BudgetRecipe, seconds_per_step: float | None = None
) -> int:
    """Return the number of optimiser steps: the smallest that epochs, ``max_steps`` and the budget allow.

    Args:
        sequences: packed sequences in one epoch. tokens: tokens in them.
        seconds_per_step: measured; used only with a budget in minutes.

    Raises:
        UserError: the budget does not reach for one step.
    """
    limits = [math.ceil(recipe.epochs * math.ceil(sequences / recipe.batch_sequences))]
    if recipe.max_steps:
        limits.append(recipe.max_steps)
    if budget.tokens:
        limits.append(int(budget.tokens / (tokens / sequences * recipe.batch_sequences)))
    if budget.minutes and seconds_per_step:
        limits.append(int(budget.minutes * 60 / seconds_per_step))
    if min(limits) < 1:
        raise UserError("the budget does not reach for one step", field="budget",
                        mend="raise it, or lower training.batch_sequences or data.max_length")  # fmt: skip
    return min(limits)


def measure_seconds_per_step(
    model: nn.Module, rows: list[dict[str, Tensor]], recipe: TrainingRecipe, objective: Objective, bfloat16: bool
) -> float:
    """Time three forward and backward passes and scale the fastest to a whole step; the model is left as it was."""
    keep_freed_memory()
    split, times = SplitModel(model), []
    micro = rows[: recipe.micro_batch_sequences]
    batch = {key: torch.stack([row[key] for row in micro]) for key in micro[0]}
    with attend_by_record(split.causal, rows) as by_record:
        for _ in range(3):
            begin = time.perf_counter()
            records = {"records": record_spans(batch["position_ids"], batch["labels"])} if by_record else {}
            with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=bfloat16):
                hidden = split.hidden(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **records)
                loss = objective.total(split.logits, hidden, batch["labels"])
            loss.backward()  # type: ignore[no-untyped-call]
            model.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - begin)
    return min(times) * math.ceil(recipe.batch_sequences / len(micro))


def flops(anatomy: Anatomy, model: Any, cost: Cost, skipped_tokens: int = 0) -> float:
    """Return the floating-point operations of a training run's matrix products with weights.

    Per token: 2 for each block weight forward; 2 more for each weight at or above the lowest trained block, for the gradient of its
    input; and 2 for each trained weight. The head and attention's own products are left out, and the blocks below the lowest
    trained one for tokens that skipped them.
    """
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    counts = [sum(_size(anatomy, name) for name in block.parameters) for block in anatomy.blocks]
    prefixes = [f"{block.prefix}." for block in anatomy.blocks]
    touched = [i for i, prefix in enumerate(prefixes) if any(prefix in name for name in trained)]
    lowest = 0 if not touched or any(name in trained for name in anatomy.embeddings) else touched[0]
    weights = sum(value.numel() for value in model.parameters() if value.requires_grad)
    forward = cost.forward_tokens * sum(counts) - skipped_tokens * sum(counts[:lowest])
    return 2.0 * (forward + cost.backward_tokens * (sum(counts[lowest:]) + weights))


def _size(anatomy: Anatomy, name: str) -> int:
    return anatomy.sizes.get(name, 0)
