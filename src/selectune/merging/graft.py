"""Grafts: the few entries of a fine-tuned model that, put into the base, carry the skill.

Knows: how a mask over a delta is learnt. It starts as the entries that changed most (the base patch) and may exchange some: every entry has a
logit, and how much of its change is taken is ``b + (1 - 2b) sigmoid(s - 10)``, b being 1 in the base patch; the loss of the model between base
and specialist is brought down by gradients of the logits alone. What is kept are the rounded masks' best, by their loss.
Does not know: how the delta was trained. A graft is a delta, and is applied, saved, added up like any other (``delta.py``).

Source: *Task-Specific Skill Localization in Fine-tuned Language Models*, ICML 2023, arXiv 2302.06600.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selectune.merging.delta import Delta
from selectune.parameters.factors.allocation import is_best
from selectune.parameters.factors.gradients import each_gradient, first, rows_of
from selectune.parameters.factors.trial import loss_on
from selectune.parameters.selection import Part, Selection
from selectune.progress import watched

if TYPE_CHECKING:
    from selectune.parameters.method import Context

BIAS = 10.0
"""Logits begin so far from the middle that the mask begins as the base patch."""


class Mask:
    """A mask over a delta that is learnt.

    Args:
        change: name -> how the weight changed, fp32, of the weight's shape (0 where it did not). entries: of the base patch.
    """

    def __init__(self, change: dict[str, Tensor], entries: int, generator: torch.Generator) -> None:
        self.change = change
        self.patch = _most({name: value.abs() for name, value in change.items()}, entries)
        self.logits = {name: torch.rand(value.shape, generator=generator).to(value.device) for name, value in change.items()}

    def share(self, name: str) -> Tensor:
        """Return how much of each entry's change is taken, between 0 and 1."""
        near = torch.sigmoid(self.logits[name] - BIAS)
        return torch.where(self.patch[name], 1 - near, near)

    def rounded(self, name: str) -> Tensor:
        """Return which entries are taken, as a bool tensor."""
        return self.share(name) > 0.5

    def gradient(self, name: str, of_weight: Tensor) -> Tensor:
        """Return the gradient of a weight's logits from that of the weight."""
        near = torch.sigmoid(self.logits[name] - BIAS)
        return torch.where(self.patch[name], -1.0, 1.0) * of_weight * self.change[name] * near * (1 - near)


def graft(
    context: Context,
    delta: Delta,
    *,
    entries: int,
    rounds: int = 10,
    learning_rate: float = 1.0,
    examples: int = 64,
    exact: bool = False,
) -> Delta:
    """Return the delta on the few entries that carry the skill; what the others changed is undone.

    Args:
        context: with the delta's base, and records of the task. entries: of the base patch. rounds: of learning, each one gradient over the
            records; 0, like a learning rate of 0, leaves the base patch. learning_rate: of plain descent, in units in which the first
            round moves the logit with the largest gradient by 1. exact: keep as many entries as the base patch has: of those
            that the mask takes the most changed, filled up with the most changed of all.

    Raises:
        UserError: the delta belongs to another base.
    """
    delta.belongs(context.base)
    model = copy.deepcopy(context.base.model).float()
    weights = dict(model.named_parameters())
    change = {}
    for name, part in delta.selection.parts.items():
        change[name] = torch.zeros(part.shape, device=weights[name].device)
        part.put(change[name], delta.changes(name))
    mask = Mask(change, entries, context.generator)
    before = {name: weights[name].detach().clone() for name in change}
    records = first(context.train, examples)
    rows = rows_of(context, records, packed=True)
    held_out = records + first(context.dev, examples)
    tokens = max(1, sum(int((row["labels"][1:] != -100).sum()) for row in rows))
    rate = 0.0

    def put(how: str) -> None:
        for name, value in change.items():
            weights[name].data.copy_(before[name] + getattr(mask, how)(name) * value)

    def loss() -> float:
        put("rounded")
        return loss_on(context, held_out, model)

    kept, lowest = mask.patch, loss() if rounds else 0.0
    for round_ in watched(range(1, rounds + 1), "learning what to keep", context.quiet):
        total = {name: torch.zeros_like(value) for name, value in change.items()}
        put("share")
        each_gradient(model, rows, change, _adding(total), meter=context.meter, bfloat16=context.bfloat16, quiet=context.quiet)
        steps = {name: mask.gradient(name, value / tokens) for name, value in total.items()}
        if round_ == 1:
            rate = learning_rate / max(max(float(value.abs().max()) for value in steps.values()), 1e-38)
        for name, value in steps.items():
            mask.logits[name].sub_(value, alpha=rate)
        now = loss()
        if now < lowest:
            kept, lowest = {name: mask.rounded(name) for name in change}, now
    if exact:
        enough = sum(int(taken.sum()) for taken in kept.values()) >= entries
        ahead = {name: value.abs().masked_fill(~kept[name] if enough else kept[name], -1.0 if enough else float("inf"))
                 for name, value in change.items()}  # fmt: skip
        kept = _most(ahead, entries)
    parts = {name: Part(tuple(taken.shape), "elements", taken.view(-1).nonzero().squeeze(-1)) for name, taken in kept.items()}
    return delta.restrict(Selection({name: part for name, part in sorted(parts.items()) if len(part.index)}))


def _most(size: dict[str, Tensor], entries: int) -> dict[str, Tensor]:
    """Return bool masks of the largest entries, so many in all; ties by order."""
    sizes = [value.numel() for value in size.values()]
    taken = is_best(torch.cat([value.view(-1) for value in size.values()]), entries)
    return {name: piece.view(value.shape) for (name, value), piece in zip(size.items(), taken.split(sizes), strict=True)}


def _adding(total: dict[str, Tensor]) -> Callable[[str, Tensor, int], None]:
    def add(name: str, gradient: Tensor, tokens: int) -> None:
        total[name].add_(gradient)

    return add
