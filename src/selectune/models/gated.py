"""Gated units that keep for the backward pass what their two first layers gave, and nothing else.

Knows: ``down(activation(gate(x)) * up(x))``, the gradient of the product, and which modules of a model compute this (each is tried
before it is replaced). Written out, the unit also keeps the activation and the product: half as much again. Does not know: what is
trained, or whether the layers have adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selectune.models.recomputed import recomputed_by


class _Product(torch.autograd.Function):
    """``activation(gate) * up``; the activation is computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_(True)
            active = ctx.activation(gate)
        (of_gate,) = torch.autograd.grad(active, gate, gradients[0] * up)
        return of_gate, active.detach().mul_(gradients[0]), None


def _unit(module: Any, states: Tensor) -> Tensor:
    gate, up, activation = module.gate_proj(states), module.up_proj(states), module.act_fn
    product: Tensor = _Product.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    gate, up = gate.detach(), up.detach()
    found: Tensor = module.down_proj(recomputed_by(product, lambda: activation(gate).mul_(up)))
    return found


@contextmanager
def short_gated_units(model: nn.Module) -> Iterator[int]:
    """Within, a model's gated units are computed this way, on a CPU.

    Yields:
        How many they are.
    """
    replaced = [module for module in model.modules() if _agrees(module)]
    for module in replaced:
        module.forward = partial(_unit, module)  # type: ignore[method-assign,assignment]
    try:
        yield len(replaced)
    finally:
        for module in replaced:
            del module.forward


@torch.no_grad()
def _agrees(module: Any) -> bool:
    """Whether a module gives what the formula gives, on a few random states."""
    if any(not hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")) or "forward" in module.__dict__:
        return False
    weight, activation = getattr(module.gate_proj, "weight", None), module.act_fn
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or list(getattr(activation, "parameters", list)()):
        return False
    if not hasattr(module.gate_proj, "in_features"):
        return False
    states, found = torch.randn(4, module.gate_proj.in_features, generator=torch.Generator().manual_seed(0)), []
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16, enabled=weight.dtype != torch.float32):
        for way in (module, partial(_unit, module)):
            torch.manual_seed(0)  # for adapters with dropout
            try:
                found.append(way(states))
            except (RuntimeError, TypeError):  # a unit that takes more than states, or other ones
                return False
    own, given = found
    if not isinstance(own, Tensor):
        return False
    return own.dtype == given.dtype and torch.allclose(given.float(), own.float(), rtol=1e-2, atol=1e-3)
