"""Training by forward passes alone: the loss is compared at two points on either side of the weights.

Knows: the direction, drawn again from its seed wherever it is needed; which entries it leaves out; the step along it. Does not know:
gradients: there is no graph, no gradient and no optimiser's state in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from selectune.training.policies.policy import Batch, Policy, Stage

if TYPE_CHECKING:
    from selectune.recipe import TrainingRecipe


class ZerothOrder(Policy):
    """MeZO, and with ``sparsity`` Sparse MeZO: only the smaller weights are perturbed."""

    name: ClassVar[str] = "zeroth_order"
    paper: ClassVar[str] = (
        "Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning, NeurIPS 2025, arXiv 2402.15751; "
        "Fine-Tuning Language Models with Just Forward Passes, NeurIPS 2023, arXiv 2305.17333"
    )
    summary: ClassVar[str] = "Two forward passes a step and no gradients: the memory of inference."
    departs: ClassVar[str] = (
        "The weights are perturbed in place in fp32 and the mask, one byte an entry, is kept for the step. Plain steps along the direction: "
        "no optimiser, no clipping, no decay. Where a recipe names no learning rate it is 3e-6, in the middle of what weights of a model of this "
        "size bear. Sparsity is off unless asked for: `small_weights` would be thinned out twice, and factors of adapters that start at zero "
        "would be left out for good."
    )
    copies: ClassVar[int] = 0
    own_gradients: ClassVar[bool] = True
    usual_rate: ClassVar[float] = 3e-6
    """The peak learning rate where a recipe names none."""

    epsilon: Annotated[float, Field(gt=0)] = 1e-3
    """Distance to either side."""
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each tensor, its largest weights at the beginning, above which weights are left out (the paper: 0.5 to 0.8); 0: MeZO."""

    def settings(self, recipe: TrainingRecipe) -> TrainingRecipe:
        found = super().settings(recipe)
        # of an optimiser without states: it is handed no gradient
        return found.model_copy(update={"learning_rate": found.learning_rate or self.usual_rate, "optimiser": "sgd"})

    def begin(self, stage: Stage) -> None:
        stage.passing["limits"] = {name: limit(value.detach(), self.sparsity) for name, value in stage.parameters.items()}

    def before_step(self, stage: Stage) -> None:
        stage.passing["difference"] = 0.0
        limits = stage.passing["limits"] if self.sparsity else {}
        stage.passing["masks"] = {name: stage.parameters[name].detach().abs() <= most for name, most in limits.items()}

    def loss(self, stage: Stage, batch: Batch, plain: Callable[[], Tensor]) -> Tensor:
        stage.whole.eval()  # both sides of one function: without dropout
        self.move(stage, self.epsilon)
        above = plain()
        self.move(stage, -2 * self.epsilon)
        below = plain()
        self.move(stage, self.epsilon)
        stage.passing["difference"] += float(above - below)
        return (above + below) / 2

    def gradients(self, stage: Stage) -> None:
        difference = stage.mean(torch.tensor(stage.passing.pop("difference"), dtype=torch.float64))
        self.move(stage, -stage.learning_rate * float(difference) / (2 * self.epsilon))
        del stage.passing["masks"]

    def move(self, stage: Stage, distance: float) -> None:
        """Move the weights along the direction of this step."""
        source = stage.generator("direction")
        for name, value in stage.parameters.items():
            direction = torch.randn(value.shape, generator=source).to(value.device)
            if name in stage.passing["masks"]:
                direction.mul_(stage.passing["masks"][name])
            value.data.add_(direction, alpha=distance)


def limit(weight: Tensor, sparsity: float) -> float:
    """Return the magnitude above which a share of the entries, rounded down, lies."""
    kept = math.ceil((1 - sparsity) * weight.numel() - 1e-9)
    return float(weight.abs().reshape(-1).kthvalue(kept).values) if sparsity else math.inf
