"""RoseLoRA: the factors of low-rank adapters become sparse, row by row and column by column, so that their product is sparse too.

Each row of A and each column of B keeps its most sensitive entries; how many follows a schedule from all to ``density``. An entry that was set to
zero has a gradient again in the next step and may come back while the schedule lasts.
Knows: sensitivities and the schedule. Does not know: where factors lie (``low_rank.py``). The product's density is at most rank * density^2.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from selectune.training.policies.low_rank import factors
from selectune.training.policies.policy import Policy, Stage


class RoseLoRA(Policy):
    """Prunes the rows of A and the columns of B to their most sensitive entries."""

    name: ClassVar[str] = "roselora"
    paper: ClassVar[str] = (
        "RoseLoRA: Row and Column-wise Sparse Low-rank Adaptation of Pre-trained Language Model for Knowledge Editing and Fine-tuning, EMNLP 2024, "
        "arXiv 2406.10777"
    )
    summary: ClassVar[str] = (
        "On low-rank adapters: their factors are pruned while they train, so that the change of the weights is sparse."
    )
    departs: ClassVar[str] = (
        "Ties are broken by position, so that exactly so many entries stay; clamping the factors is off unless asked for."
    )
    keeps_last: ClassVar[bool] = True

    density: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the entries that each row of A and each column of B keeps at the end."""
    start: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the run before the first entry is pruned: B starts at zero, and nothing is known of it."""
    stop: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the run after which the density is reached."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """Of the sensitivity, the share of what it was before."""
    clamp: Annotated[float, Field(gt=0)] | None = None
    """Largest size of an entry of the factors (0.02 for editing single facts)."""

    @model_validator(mode="after")
    def _in_order(self) -> RoseLoRA:
        if self.stop <= self.start:
            raise ValueError("pruning has to stop after it starts")
        return self

    def span(self, stage: Stage) -> tuple[float, float]:
        """Return the steps between which the density falls."""
        end = min(self.stop * stage.steps, stage.steps - 1)
        return min(self.start * stage.steps, end), end

    def begin(self, stage: Stage) -> None:
        factors(stage, self.name)  # there must be some

    def gradients(self, stage: Stage) -> None:
        with torch.no_grad():
            for one in factors(stage, self.name).values():
                for name, value in ((one.down_name, one.down), (one.up_name, one.up)):
                    if value.grad is not None:
                        now = (value * value.grad).abs()
                        before = stage.tensors.get(name)
                        stage.tensors[name] = now if before is None else self.smoothing * before + (1 - self.smoothing) * now

    def after_step(self, stage: Stage) -> None:
        share = density_at(stage.step, *self.span(stage), self.density)
        for one in factors(stage, self.name).values():
            if share < 1 and one.down_name in stage.tensors and one.up_name in stage.tensors:
                one.down.mul_(kept(stage.tensors[one.down_name], share))
                one.up.mul_(kept(stage.tensors[one.up_name].t(), share).t())
            if self.clamp is not None:
                for value in (one.down, one.up):
                    value.clamp_(-self.clamp, self.clamp)


def density_at(step: float, begin: float, end: float, density: float) -> float:
    """Return the density after some step: 1, then a cubic fall, then ``density``."""
    if step < begin:
        return 1.0
    if step >= end:
        return density
    return density + (1 - density) * (1 - (step - begin) / (end - begin)) ** 3


def kept(scores: Tensor, share: float) -> Tensor:
    """Return, as 1 and 0, the entries of each row that stay: all but ``floor(length * (1 - share))``, the highest; ties by position."""
    length = scores.shape[1]
    count = length - int(length * (1 - share) + 1e-9)
    order = scores.nan_to_num(nan=-1.0).argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores).scatter_(1, order, 1.0)
