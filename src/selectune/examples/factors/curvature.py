"""Curvature of a record's loss at a matrix of the last block, for the price of three products with the vocabulary.

Knows: how the gradient of a cross-entropy moves when the last hidden states move, and when what a layer of the last block says moves.
Does not know: which direction is asked for, or why.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.func import jvp

from selectune.data.chat import Encoded
from selectune.examples.factors.last_block import Linear, entering
from selectune.examples.factors.signals import Worker
from selectune.models.head import SplitModel

ROWS = 16
"""Positions whose logits are in fp32 at once."""


def hessian_product(
    worker: Worker, piece: Encoded, layer: Linear, direction: Tensor, entered: Tensor | None, pull: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the Hessian of a piece's summed loss in a layer's weight, times a direction; and the gradient in the last hidden states.

    Everything before the layer is fixed, so a weight W that moves by D moves what the layer says from ``x W^T`` by ``x D^T``; the gradient there,
    whose product with x is the weight's, moves by the Hessian of what follows: forward to the last hidden states, through the loss, and back.

    Args:
        direction: ``(outputs, inputs)`` fp32. entered: what enters the last block, ``(length, hidden)``, where it is known.
        pull: the gradient in the last hidden states ``(learnt positions, hidden)``, where it is known.
    """
    split, device = worker.loss.split, direction.device
    met: dict[str, Tensor] = {}

    def cut(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        met["in"], met["out"] = inputs[0].detach(), output.detach().requires_grad_(True)
        return met["out"]

    wanted = torch.tensor(piece.labels[1:], device=device)
    learnt = wanted != -100
    with ExitStack() as stack:
        stack.enter_context(entering(worker.base, entered))
        stack.callback(worker.base.model.get_submodule(layer.module).register_forward_hook(cut).remove)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=worker.bfloat16))
        states = split.hidden(input_ids=torch.tensor(piece.input_ids, device=device)[None])[0, :-1][learnt]
        length, blocks = len(piece.input_ids), len(worker.base.anatomy.blocks)
        worker.meter.count(forward=length if entered is None else length // blocks, backward=length // blocks)
        inward, said = met["in"], met["out"]
        moved = (inward.float() @ direction.T).to(said.dtype)
        any_pull = torch.zeros_like(states, requires_grad=True)
        (back,) = torch.autograd.grad(states, said, any_pull, create_graph=True)
        (states_move,) = torch.autograd.grad(back, any_pull, moved)
        pull, pull_moves = moved_pull(split, states.detach(), states_move, wanted[learnt], pull)
        (slope,) = torch.autograd.grad(states, said, pull, create_graph=True)
        (slope_moves,) = torch.autograd.grad([states, slope], said, [pull_moves, moved])
    return slope_moves.flatten(0, -2).float().T @ inward.flatten(0, -2).float(), pull


def moved_pull(split: SplitModel, states: Tensor, moved: Tensor, targets: Tensor, pull: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradient of the summed cross-entropy in the last hidden states, and what is added to it when these move; as ``states``.

    Args:
        states, moved: ``(positions, hidden)``. targets: ``(positions,)`` int64. pull: the gradient, where it is known.
    """
    head = split.causal.get_output_embeddings()
    with torch.enable_grad():
        states = states.requires_grad_(True)
        raw = head(states)
    with torch.no_grad():
        moving = head(moved) if head.bias is None else head(moved) - head.bias
        steep, change = torch.empty_like(raw), torch.empty_like(raw)
        for some in torch.arange(len(targets)).split(ROWS):
            rows = slice(int(some[0]), int(some[-1]) + 1)
            steep[rows], change[rows] = moved_slope(split.finish, raw[rows].float(), moving[rows].float(), targets[rows])
    (pull_moves,) = torch.autograd.grad(raw, states, change, retain_graph=pull is None)
    if pull is None:
        (pull,) = torch.autograd.grad(raw, states, steep)
    return pull, pull_moves


def moved_slope(finish: Callable[[Tensor], Tensor], raw: Tensor, moving: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the cross-entropy in the logits as the head gives them, and what is added to it when these move.

    Args:
        finish: what is done to each logit before the softmax. raw, moving: ``(positions, vocabulary)`` fp32. targets: ``(positions,)`` int64.
    """
    ones = torch.ones_like(raw)
    logits, moved = jvp(finish, (raw,), (moving,))  # type: ignore[misc]
    steep, bent = jvp(lambda some: jvp(finish, (some,), (ones,))[1], (raw,), (moving,))  # type: ignore[misc]
    shares = logits.softmax(-1)
    change = shares * (moved - (shares * moved).sum(-1, keepdim=True))
    shares[torch.arange(len(targets), device=targets.device), targets] -= 1
    return steep * shares, steep * change + bent * shares
