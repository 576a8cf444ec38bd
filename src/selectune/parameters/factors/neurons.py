"""Neurons of the MLP: how much the loss on some records depends on each.

Knows: the first-order estimate of what the loss would change if a neuron's activation were zero, ``|h * dL/dh|`` averaged over tokens; how much a
block changes what passes through it; the part of the weights that a neuron is. Does not know: which neurons are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selectune.errors import UserError
from selectune.models.anatomy import Block
from selectune.models.head import SplitModel
from selectune.parameters.factors.gradients import batch_of, rows_of
from selectune.parameters.factors.targets import targets
from selectune.parameters.factors.trial import in_bfloat16
from selectune.parameters.factors.units import unit_slices
from selectune.parameters.selection import Part, Selection
from selectune.progress import watched

if TYPE_CHECKING:
    from selectune.data import Record
    from selectune.models import Base
    from selectune.parameters.method import Context


def down_of(block: Block) -> str:
    """Return the name of the layer whose input are a block's neurons.

    Raises:
        UserError: the block is a mixture of experts.
    """
    name = next((name for name, role in block.linears.items() if role == "down"), None)
    if name is None or block.experts:
        raise UserError("the neurons of a mixture of experts are not told apart", field="parameters", expected="a dense base")
    return name


def awareness(context: Context, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
    """Return each neuron's awareness of some records, and each block's change of what passes through it.

    Returns:
        ``(blocks, neurons)``: mean over tokens of ``|h * dL/dh|``, L the mean loss of a record's response tokens; and ``(blocks,)``: mean over
        tokens and features of the size of the difference between a block's output and its input. Both fp32.
    """
    from selectune.objectives.cross_entropy import CrossEntropy

    model, blocks = context.base.model, context.base.anatomy.blocks
    split, objective = SplitModel(model), CrossEntropy()
    aware = torch.zeros(len(blocks), blocks[0].channels)
    change = torch.zeros(len(blocks))
    tokens = 0

    def watch(number: int) -> Any:
        def look(layer: Any, inputs: tuple[Any, ...]) -> None:
            states = inputs[0].detach()

            def add(gradient: Tensor) -> None:
                aware[number] += (states.float() * gradient.float()).abs().flatten(0, -2).sum(0).cpu()

            inputs[0].register_hook(add)

        return look

    def compare(number: int) -> Any:
        def look(layer: Any, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            entered = inputs[0] if inputs else keywords["hidden_states"]
            left = output[0] if isinstance(output, tuple) else output
            change[number] += (left.detach().float() - entered.detach().float()).abs().mean(-1).sum().cpu()

        return look

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.callback(model.get_submodule(down_of(block)).register_forward_pre_hook(watch(number)).remove)
            stack.callback(model.get_submodule(block.prefix).register_forward_hook(compare(number), with_kwargs=True).remove)
        entry = model.get_input_embeddings()
        stack.callback(entry.register_forward_hook(lambda _, __, output: output.detach().requires_grad_(True)).remove)
        for row in watched(rows_of(context, records), "following the neurons", context.quiet):
            batch = batch_of(model, [row])
            with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=in_bfloat16(context)):
                hidden = split.hidden(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
                total = objective.total(split.logits, hidden, batch["labels"])
            (total / (batch["labels"][:, 1:] != -100).sum().clamp(min=1)).backward()
            tokens += batch["input_ids"].numel()
            context.meter.count(forward=batch["input_ids"].numel(), backward=batch["input_ids"].numel())
    return aware / max(tokens, 1), change / max(tokens, 1)


def neurons(base: Base, chosen: Mapping[int, Tensor]) -> Selection:
    """Return some neurons (block -> ``(n,)`` int64) as the rows of gate and up and the columns of down that they are."""
    inside = targets(base, "mlp")
    parts: dict[str, Part] = {}
    for block in base.anatomy.blocks:
        if len(chosen.get(block.index, ())):
            _, slices = unit_slices("channel", block, [target for target in inside if target.block == block.index])
            for piece in slices:
                one = Selection({piece.target.name: piece.part(chosen[block.index])})
                parts |= (Selection({k: v for k, v in parts.items() if k == piece.target.name}) | one).parts
    return Selection(dict(sorted(parts.items())))
