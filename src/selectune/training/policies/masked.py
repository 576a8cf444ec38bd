"""What policies that hold some entries back have in common.

Knows: how a factor for each entry is applied, to the gradient (the optimiser's momentum still moves what is held back) or to the update
(a factor of 0 leaves the weight as it was, bit for bit; momentum and weight decay included). Does not know: where factors come from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from selectune.parameters.factors.allocation import is_best
from selectune.training.policies.policy import Policy, Stage


class Masked(Policy, ABC):
    """Multiplies each entry's gradient or update by a factor."""

    mask: Literal["gradient", "update"] = "gradient"
    """What is multiplied: the gradient, before it is clipped; or what the optimiser makes of the whole gradient."""

    @property
    def copies(self) -> int:  # type: ignore[override]
        """Beside the gradients the factors, and what is put back."""
        return 3 if self.mask == "update" else 2

    @abstractmethod
    def factors(self, stage: Stage) -> dict[str, Tensor]:
        """Return factors from 0 to 1 (more, for gradients) by name, of the shape of what trains; where there is none, it is 1."""

    def gradients(self, stage: Stage) -> None:
        factors = self.factors(stage)
        if self.mask == "update":
            stage.passing["update"] = {
                name: (stage.parameters[name].detach().clone(), factor) for name, factor in factors.items()
            }
            return
        for name, factor in factors.items():
            gradient = stage.parameters[name].grad
            if gradient is not None:
                gradient.mul_(factor)

    def after_step(self, stage: Stage) -> None:
        for name, (before, factor) in stage.passing.pop("update", {}).items():
            after = stage.parameters[name].data
            after.copy_(torch.lerp(before, after, factor.to(after.dtype)))  # exact at 0 and at 1


def largest(scores: Tensor, share: float) -> Tensor:
    """Return 1 at the largest entries, a share of them rounded up, and 0 elsewhere; ties go to the lower place. fp32."""
    return is_best(scores.reshape(-1), math.ceil(share * scores.numel() - 1e-9)).float().view(scores.shape)
