"""Cross-entropy of the response tokens: the ordinary loss of supervised fine-tuning."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from selectune.objectives.objective import Objective, Predictions


class CrossEntropy(Objective):
    """Negative log-likelihood of the response tokens, with smoothed labels if asked for."""

    name: ClassVar[str] = "cross_entropy"
    paper: ClassVar[str] = (
        "Label smoothing: Rethinking the Inception Architecture for Computer Vision, CVPR 2016, arXiv 1512.00567"
    )
    summary: ClassVar[str] = "Negative log-likelihood of the response tokens."

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target's mass that is spread evenly over the whole vocabulary."""

    def losses(self, said: Predictions) -> Tensor:
        if not self.label_smoothing:
            return -said.log_probability
        even = said.log_partition - said.logits.mean(-1)
        return (1 - self.label_smoothing) * -said.log_probability + self.label_smoothing * even
