"""Dropout and masks in a model that has none of its own.

Knows: where the branches of a block meet the residual stream, and how their outputs are dropped or multiplied there for a while.
Does not know: what the passes are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selectune.models import Anatomy


def branches(causal: Any) -> list[nn.Module]:
    """Return the modules whose outputs are added to the residual stream: attention and MLP of every block."""
    found = []
    for block in Anatomy.of(causal).blocks:
        module = causal.get_submodule(block.prefix)
        found += [child for name, child in module.named_children() if any(f"{block.prefix}.{name}." in f"{linear}." for linear in block.linears)
                  or any(f"{block.prefix}.{name}." in weight for weight in block.expert_parameters)]  # fmt: skip
    return found


@contextmanager
def dropping(modules: list[nn.Module], share: float, generator: torch.Generator) -> Iterator[None]:
    """Within, a share of these modules' outputs is set to zero and the rest scaled up: the same each time a module is computed, so that
    activations may be computed again for the backward pass."""
    first = int(torch.randint(1 << 40, (), generator=generator))
    seeds = {module: first + number for number, module in enumerate(modules)}

    def drop(module: nn.Module, inputs: Any, output: Any) -> Any:
        source = torch.Generator().manual_seed(seeds[module])
        return _with_first(output, lambda states: states * _kept(states, share, source))

    with _hooked(modules, drop):
        yield


def _kept(states: Tensor, share: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(states.shape, generator=generator).to(states.device)
    return (drawn >= share).to(states.dtype) / (1 - share)


def _with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


@contextmanager
def _hooked(modules: list[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
