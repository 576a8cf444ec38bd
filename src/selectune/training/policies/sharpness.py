"""Gradients are taken where the loss is worst nearby: flat minima.

Knows: the step uphill, the gradient there, the way back. Does not know: how the optimiser steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from selectune.training.policies.policy import Batch, Policy, Stage


class Sharpness(Policy):
    """Sharpness-aware minimisation (SAM) over what trains."""

    name: ClassVar[str] = "sharpness"
    paper: ClassVar[str] = "Sharpness-Aware Minimization for Efficiently Improving Generalization, ICLR 2021, arXiv 2010.01412"
    summary: ClassVar[str] = "Steps by the gradient at the worst nearby weights (SAM): two passes a step."
    copies: ClassVar[int] = 3

    radius: Annotated[float, Field(ge=0)] = 0.02
    """Length of the step uphill, over all that trains; 0: plain training."""

    def before_step(self, stage: Stage) -> None:
        stage.passing["again"] = []

    def loss(self, stage: Stage, batch: Batch, plain: Callable[[], Tensor]) -> Tensor:
        stage.passing["again"].append(plain)
        return plain()

    def gradients(self, stage: Stage) -> None:
        again = stage.passing.pop("again")
        found = {name: gradient for name, _, gradient in stage.gradients()}
        if not self.radius or not found:
            return
        norm = torch.stack([gradient.norm() for gradient in found.values()]).norm()
        if not norm > 0:
            return
        before = {name: stage.parameters[name].detach().clone() for name in found}
        for name, gradient in found.items():
            stage.parameters[name].data.add_(gradient * (self.radius / norm))
        stage.clear()
        with torch.enable_grad():
            for plain in again:
                plain().backward()
        for name, value in before.items():
            stage.parameters[name].data.copy_(value)
