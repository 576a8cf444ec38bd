"""Specialists of one base that were trained apart, averaged.

Knows: the mean of several sets of weights (lo-fi: workers on shards of the data that never talk), weighted by what each has read if asked, and the
check that averaging makes sense: the loss on the straight line between two specialists. Adapters are averaged as the changes of weights that they
stand for: the mean of two products of factors is not the product of their means. Does not know: how they were trained. Of lo-fi the average at
the end is all that is here: each worker is a run that is started by itself, on its shard of the records.

Source: *lo-fi: distributed fine-tuning without communication*, TMLR 2023, arXiv 2210.11948.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selectune.errors import UserError


@torch.no_grad()
def average(models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Return the mean of several models' parameters, by name, each in the first model's dtype.

    The sum is made in fp64, so the order of the models does not matter.

    Args:
        models: plain models (adapters merged) of one base. weights: of the models, such as the tokens that each has read; equal when left out.

    Raises:
        UserError: none is given, they differ in their parameters, or the weights make no sense.
    """
    if not models:
        raise UserError("there is nothing to average", expected="at least one specialist")
    shares = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(models) or min(shares) < 0 or sum(shares) <= 0:
        raise UserError(
            f"{len(shares)} weights for {len(models)} specialists",
            field="weights",
            expected="one for each, none below 0, not all 0",
        )
    every = [dict(model.named_parameters()) for model in models]
    for other in every[1:]:
        if other.keys() != every[0].keys() or any(value.shape != every[0][name].shape for name, value in other.items()):
            raise UserError("the specialists are not of one base", expected="the same parameters in each; merge adapters first")
    found = {}
    for name, first in every[0].items():
        total = torch.zeros(first.shape, dtype=torch.float64, device=first.device)
        for share, values in zip(shares, every, strict=True):
            total += share / sum(shares) * values[name].to(total)
        found[name] = total.to(first.dtype)
    return found


@torch.no_grad()
def put(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write parameters into a model in place."""
    for name, value in model.named_parameters():
        if name in weights:
            value.copy_(weights[name])


def barrier(model: nn.Module, one: nn.Module, other: nn.Module, loss: Callable[[Any], float], points: int = 5) -> float:
    """Return by how much the loss on the way between two models exceeds the straight line between their losses, at its worst.

    Near 0 the two lie in one basin, and their mean is worth trying; far above, they do not.

    Args:
        model: of the same kind; it is written into. loss: of a model. points: places on the way, the ends among them.
    """
    losses = []
    for place in range(points):
        share = place / (points - 1)
        put(model, average([one, other], [1 - share, share]))
        losses.append(loss(model))
    return max(value - (losses[0] + (losses[-1] - losses[0]) * place / (points - 1)) for place, value in enumerate(losses))
