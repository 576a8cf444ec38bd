"""Root-mean-square norms on a CPU, in few passes over memory and with little kept for the backward pass.

Knows: the norm and its gradient, and which modules of a model are such norms (each is tried before it is replaced). Written out, the norm
keeps two fp32 copies of its input for the backward pass and makes some fifteen passes over memory; here it keeps the input itself
and one number a token, from which its output can be had again by the layers that would keep it. Does not know: what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selectune.models.recomputed import recomputed_by


class _RootMeanSquareNorm(torch.autograd.Function):
    """``weight * x / sqrt(mean(x^2) + epsilon)``; the quotient is computed in fp32 and rounded to ``x``'s dtype before the product.

    Returns the product in ``dtype``, and the reciprocal of the root, ``(..., 1)`` fp32.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(states.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(states, inverse, weight)
        ctx.mark_non_differentiable(inverse)
        return _scaled(states, inverse, weight, dtype), inverse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        states, inverse, weight = ctx.saved_tensors
        unit = states.float() * inverse
        given = (gradients[0] * weight).float()
        share = torch.linalg.vecdot(given, unit).unsqueeze(-1).div_(states.shape[-1])
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradients[0].float() * unit).reshape(-1, states.shape[-1]).sum(0).to(weight.dtype)
        return given.addcmul_(unit, share, value=-1).mul_(inverse).to(states.dtype), of_weight, None, None


def _scaled(states: Tensor, inverse: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight * (states.float() * inverse).to(states.dtype)).to(dtype)


def _norm(module: Any, epsilon: float, before_products: bool, states: Tensor) -> Tensor:
    """Return the norm; before products of an autocast in the dtype that each of them would round it to."""
    weight, kind = module.weight, states.device.type
    dtype = torch.promote_types(weight.dtype, states.dtype)
    if before_products and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    found, inverse = _RootMeanSquareNorm.apply(states, weight, epsilon, dtype)  # type: ignore[no-untyped-call]
    states, weight = states.detach(), weight.detach()
    return recomputed_by(found, lambda: _scaled(states, inverse, weight, dtype))


@contextmanager
def short_norms(model: nn.Module) -> Iterator[int]:
    """Within, a model's norms that are of this kind are computed this way, on a CPU.

    Yields:
        How many they are.
    """
    replaced = []
    products = _before_products(model)
    for module in model.modules():
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if type(module).__name__.endswith("RMSNorm") and isinstance(epsilon, float) and _agrees(module, epsilon):
            module.forward = partial(_norm, module, epsilon, module in products)  # type: ignore[method-assign]
            replaced.append(module)
    try:
        yield len(replaced)
    finally:
        for module in replaced:
            del module.forward


def _before_products(model: nn.Module) -> set[nn.Module]:
    """Return the norms whose output goes to linear layers alone: the two of a block that has one before attention and one before its unit."""
    pair = {"input_layernorm", "post_attention_layernorm"}
    found: set[nn.Module] = set()
    for block in model.modules():
        norms = {name: child for name, child in block.named_children() if type(child).__name__.endswith("RMSNorm")}
        if set(norms) == pair and hasattr(block, "mlp") and not hasattr(block.mlp, "experts"):
            found.update(norms.values())
    return found


@torch.no_grad()
def _agrees(module: Any, epsilon: float) -> bool:
    """Whether a module gives what the formula gives, on a few random states."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or weight.device.type != "cpu" or "forward" in module.__dict__:
        return False
    states = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    given, own = _norm(module, epsilon, False, states), module(states)
    return given.dtype == own.dtype and torch.allclose(given.float(), own.float(), rtol=1e-2, atol=1e-3)
