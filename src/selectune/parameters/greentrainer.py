"""The tensors that lower the loss most for a given amount of work in the backward pass.

Knows: what a tensor's gradient and reaching it cost, what the tensor is worth, and the exact choice. Does not know: knapsacks
(``factors/knapsack.py``), or how a choice is renewed while training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from selectune.errors import UserError
from selectune.parameters.factors.gradients import each_gradient, first, rows_of
from selectune.parameters.factors.knapsack import backward_knapsack
from selectune.parameters.factors.trial import hooked, trial
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base


@dataclass(frozen=True)
class Work:
    """Multiplications of one tensor for a batch."""

    name: str
    passing: float
    """To pass the gradient through to what lies below."""
    own: float
    """To compute the tensor's own gradient."""
    forward: float


def work(base: Base, tokens: int, length: int) -> list[Work]:
    """Return the work of every tensor of a base, in the order in which a forward pass meets them, derived from their shapes.

    A matrix costs a product each way, a norm or bias its width for each token; attention's own products are passed through with the
    values. A tied embedding has the head's product as its own and lies at the input.

    Args:
        tokens: in the batch. length: of one of its sequences.
    """
    model, anatomy = base.model, base.anatomy
    config = model.config.get_text_config()
    active = getattr(config, "num_experts_per_tok", None) or 1
    roles = {f"{module}.weight": (role, block) for block in anatomy.blocks for module, role in block.linears.items()}
    experts = {name: block.experts for block in anatomy.blocks for name in block.expert_parameters}
    found = []
    for name in _order(model):
        size = float(anatomy.sizes[name])
        if name in anatomy.embeddings:
            head = tokens * size + size if name == anatomy.head else float(tokens * anatomy.hidden_size)
            found.append(Work(name, 0.0, head, tokens * size if name == anatomy.head else 0.0))
        elif name in experts:
            share = size * active / experts[name] * tokens
            found.append(Work(name, share, share, share))
        elif name == anatomy.head or name in roles:
            attention = 0.0
            if name in roles and roles[name][0] in ("value", "query_key_value"):
                block = roles[name][1]
                attention = 2.0 * tokens * length * block.heads * block.head_size
            found.append(Work(name, tokens * size + 2 * attention, tokens * size, tokens * size + attention))
        else:
            through = 0.0 if name.endswith("bias") else tokens * size
            found.append(Work(name, through, tokens * size, tokens * size))
    return found


@torch.no_grad()
def _order(model: Any) -> list[str]:
    """Names of the parameters in the order in which a forward pass meets their modules."""
    names = {id(value): name for name, value in model.named_parameters()}
    met: dict[str, None] = {}
    holders = {name: module for name, module in model.named_modules() if module._parameters}

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for value in module._parameters.values():
            if value is not None:
                met[names[id(value)]] = None

    with hooked(holders, note):
        model(input_ids=torch.arange(8, device=next(model.parameters()).device)[None], use_cache=False)
    return [*met, *(name for name in names.values() if name not in met)]


def within(tensors: Sequence[Work], credits: Sequence[float], share: float, grid: int = 1000) -> list[str]:
    """Return the tensors with the highest total credit whose backward pass takes at most a share of the whole one's work.

    Work is counted in whole units of ``1 / grid`` of the whole backward pass, rounded down.
    """
    whole = sum(one.passing + one.own for one in tensors)
    upward = list(reversed(range(len(tensors))))
    own, passing = ([int(grid * getattr(tensors[i], kind) / whole) for i in upward] for kind in ("own", "passing"))
    chosen = backward_knapsack([credits[i] for i in upward], own, passing, int(grid * share + 1e-9))
    return [tensors[upward[place]].name for place in chosen]


def backward_share(tensors: Sequence[Work], ratio: float) -> float:
    """Return which share of the backward pass is left when a whole step may take a share of full training's work."""
    forward, backward = sum(one.forward for one in tensors), sum(one.passing + one.own for one in tensors)
    share = ratio * (1 + forward / backward) - forward / backward
    return share if share > 0 else 0.05


class GreenTrainer(ParameterMethod):
    """The tensors with the highest credit within the budget of work."""

    name: ClassVar[str] = "greentrainer"
    family: ClassVar[str] = "modules"
    paper: ClassVar[str] = (
        "Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation, ICLR 2024, arXiv 2309.13192"
    )
    summary: ClassVar[str] = "The tensors that lower the loss most within a budget of work; exact, by dynamic programming."
    departs: ClassVar[str] = (
        "Chosen once; the paper chooses anew every two epochs. Work is derived from the base's own shapes. The tensor closest to the input may be "
        "chosen too, which the released code leaves out; its credit step runs on a copy, so that no optimiser state remembers it."
    )

    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Work of a training step as a share of full training's."""
    examples: Annotated[int, Field(gt=0)] = 8
    """Training records in the batch on which credit is measured."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Of the one step that credit is measured by."""

    def select(self, context: Context) -> Selection:
        base = context.base
        rows = rows_of(context, first(context.train, self.examples), packed=True)
        length = context.encoder.max_length
        tensors = work(base, len(rows) * length, length)
        credit = self.credits(context)
        chosen = within(tensors, [credit[one.name] for one in tensors], backward_share(tensors, self.ratio))
        if not chosen:
            raise UserError("no tensor that lowers the loss is within this budget of work", field="parameters.ratio",
                            expected="a larger ratio")  # fmt: skip
        for block in base.anatomy.blocks:
            context.block_scores[block.index] = sum(credit[name] for name in block.parameters)
        return Selection.of(base.model, chosen)

    def credits(self, context: Context) -> dict[str, float]:
        """Return each tensor's share in the fall of the loss of one step: ``-<gradient after the step, step>``, the largest 1."""
        records = first(context.train, self.examples)
        rows = rows_of(context, records, packed=True)
        names = list(context.base.anatomy.sizes)
        stepped = trial(
            context,
            Selection.all(context.base.model),
            records=records,
            steps=1,
            learning_rate=self.learning_rate,
            batch=len(rows),
        )
        found = dict.fromkeys(names, 0.0)

        def add(name: str, gradient: Tensor, tokens: int) -> None:
            found[name] -= float((gradient * stepped.change(name)).sum())

        each_gradient(stepped.model, rows, names, add, meter=context.meter, bfloat16=context.bfloat16, quiet=context.quiet)
        context.examples_scored = len(records)
        largest = max(abs(value) for value in found.values()) or 1.0
        return {name: value / largest for name, value in found.items()}
