"""Scores of weights, written once; methods combine them.

Knows: the diagonal Fisher information, by one backward pass per example. Does not know: what is done with a score.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from selectune.meter import Meter
from selectune.models.head import SplitModel


def fisher_diagonal(
    model: nn.Module,
    examples: list[tuple[Tensor, Tensor]],
    names: Iterable[str],
    labels: Literal["true", "sampled"] = "true",
    generator: torch.Generator | None = None,
    meter: Meter | None = None,
    bfloat16: bool = False,
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information of some parameters at the model's present weights.

    ``F[p] = 1/N * sum over i of (d s_i / d p)^2``, elementwise, with ``s_i`` the *sum* of the log-probabilities of example
    i's response tokens. Each example has a backward pass of its own: squaring the gradient of a batch's mean would be
    another, biased quantity.

    Args:
        model: a causal model in evaluation mode. examples: pairs of ``input_ids`` and ``labels``, each ``(length,)`` int64.
        names: parameters to score. labels: ``"true"`` for the empirical Fisher, ``"sampled"`` for labels drawn from the model.
        bfloat16: compute the products in bf16 (gradients are accumulated in fp32 all the same).

    Returns:
        name -> fp32 tensor of the parameter's shape.
    """
    wanted = set(names)
    scored = {name: value for name, value in model.named_parameters() if name in wanted}
    before = {name: value.requires_grad for name, value in model.named_parameters()}
    model.requires_grad_(False)
    for value in scored.values():
        value.requires_grad_(True)
    total = {name: torch.zeros(value.shape, dtype=torch.float32) for name, value in scored.items()}
    split = SplitModel(model)
    watched = track(examples, "scoring", console=Console(file=sys.stderr), transient=True) if len(examples) > 20 else examples
    try:
        for ids, targets in watched:
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16):
                score = _log_likelihood(split, ids, targets, labels, generator)
            gradients = torch.autograd.grad(score, list(scored.values()), allow_unused=True)
            for (name, _), gradient in zip(scored.items(), gradients, strict=True):
                if gradient is not None:
                    total[name].addcmul_(gradient.float(), gradient.float())
            if meter is not None:
                meter.count(forward=len(ids), backward=len(ids))
    finally:
        for name, value in model.named_parameters():
            value.requires_grad_(before[name])
    return {name: value / len(examples) for name, value in total.items()}


def _log_likelihood(split: SplitModel, ids: Tensor, targets: Tensor, labels: str, generator: torch.Generator | None) -> Tensor:
    hidden = split.hidden(input_ids=ids[None])[0, :-1]
    kept = (targets[1:] != -100).nonzero().squeeze(-1)
    log_probabilities = split.logits(hidden[kept]).float().log_softmax(-1)
    chosen = targets[1:][kept]
    if labels == "sampled":
        chosen = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator).squeeze(-1)
    return log_probabilities.gather(-1, chosen[:, None]).sum()


def block_norms(scores: dict[str, Tensor], blocks: Iterable[tuple[int, Iterable[str]]]) -> dict[int, float]:
    """Return, for each block, the sum over its tensors of the Frobenius norm of their scores."""
    return {index: sum(float(scores[name].norm()) for name in names if name in scores) for index, names in blocks}


def top(scores: dict[int, float], k: int, key: Callable[[float], float] = lambda score: -score) -> list[int]:
    """Return the k indices of the highest scores, ties broken by index."""
    return sorted(sorted(scores, key=lambda index: (key(scores[index]), index))[:k])
