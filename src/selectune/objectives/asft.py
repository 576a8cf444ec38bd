"""Anchored fine-tuning: probability-scaled cross-entropy with a divergence from the untrained base added.

Knows: the two terms. Does not know: how the base's predictions are had; the trainer gives them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from selectune.objectives.objective import Objective, Predictions


class ASFT(Objective):
    """``-scale * log p(target) + anchor * KL`` of each token."""

    name: ClassVar[str] = "asft"
    paper: ClassVar[str] = "Anchored Supervised Fine-Tuning, ICLR 2026, arXiv 2509.23753"
    summary: ClassVar[str] = "Cross-entropy (scaled by probability) with a KL anchor to the base."
    departs: ClassVar[str] = "The divergence is that of the released code, KL(base || model); the text's direction is a setting."
    needs_reference: ClassVar[bool] = True

    anchor: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the divergence."""
    scaled: bool = True
    """Scale each token by its probability (DFT); off: plain cross-entropy with the anchor."""
    direction: Literal["base_to_model", "model_to_base"] = "base_to_model"
    """KL(base || model), or KL(model || base)."""

    def losses(self, said: Predictions) -> Tensor:
        assert said.reference_logits is not None
        scale = said.log_probability.detach().exp() if self.scaled else 1.0
        model = said.logits - said.log_partition[:, None]
        base = said.reference_logits.log_softmax(-1)
        one, other = (base, model) if self.direction == "base_to_model" else (model, base)
        divergence = (one.exp() * (one - other)).sum(-1)
        return -scale * said.log_probability + self.anchor * divergence
