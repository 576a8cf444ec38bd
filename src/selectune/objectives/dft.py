"""Dynamic fine-tuning: each token's loss is scaled by the probability that the model gives it.

Its gradient is that of the mean probability of the tokens instead of their mean log-probability, so tokens that the model finds absurd
pull little; with them go new facts, which the authors name as the method's limit.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from selectune.objectives.objective import Objective, Predictions


class DFT(Objective):
    """Cross-entropy, each token scaled by its own probability (through which no gradient flows)."""

    name: ClassVar[str] = "dft"
    paper: ClassVar[str] = (
        "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification, 2025, arXiv 2508.05629"
    )
    summary: ClassVar[str] = "Cross-entropy, each token scaled by its own probability."

    plain_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of plain cross-entropy in the mixture; 0 is the paper's."""

    def losses(self, said: Predictions) -> Tensor:
        scale = said.log_probability.detach().exp()
        return -(self.plain_share + (1 - self.plain_share) * scale) * said.log_probability
