"""Cross-entropy of the response tokens: the ordinary loss of supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from selectune.objectives.objective import Objective


class CrossEntropy(Objective):
    """Mean negative log-likelihood of the response tokens."""

    name: ClassVar[str] = "cross_entropy"
    summary: ClassVar[str] = "Negative log-likelihood of the response tokens."

    def from_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, reduction="sum")
