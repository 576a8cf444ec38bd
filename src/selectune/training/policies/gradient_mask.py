"""Each update is made with the largest gradients alone.

Knows: the mask, anew for every update, from the gradient of the whole batch. Does not know: how it is applied.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from selectune.training.policies.masked import Masked, largest
from selectune.training.policies.policy import Stage


class GradientMask(Masked):
    """Of each tensor, the entries with the largest gradient of the batch are updated."""

    name: ClassVar[str] = "gradient_mask"
    paper: ClassVar[str] = "Gradient-Mask Tuning Elevates the Upper Limits of LLM Performance, AAAI 2025, arXiv 2406.15330"
    summary: ClassVar[str] = "Each update keeps only the largest gradients of each tensor."
    departs: ClassVar[str] = (
        "Exactly the share that is asked for is kept, ties by place; `mask: update` holds back momentum too. Embeddings that train are masked "
        "like the rest."
    )

    keep: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the entries of each tensor that is updated, rounded up."""

    def factors(self, stage: Stage) -> dict[str, Tensor]:
        return {name: largest(gradient.abs(), self.keep) for name, _, gradient in stage.gradients()}
