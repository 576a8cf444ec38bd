"""OSF: each layer's smallest singular directions train, orthogonally to the large ones, which stay.

Configures PEFT's tuner; nothing of it is written here again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from selectune.adapters.peft_tuner import PEFTTuner
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base


class OSF(PEFTTuner):
    """The part of each layer of the chosen blocks that its largest singular directions do not span."""

    name: ClassVar[str] = "osf"
    paper: ClassVar[str] = (
        "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning, ICLR 2026, arXiv 2504.07097"
    )
    summary: ClassVar[str] = "Each layer's smallest singular directions train, orthogonally to the large ones (PEFT)."
    departs: ClassVar[str] = "The same share of each layer; the paper sets it by the layer's importance."
    learning_rate_default: ClassVar[float] = 1e-4
    rounds: ClassVar[bool] = True

    kept: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of each layer's singular directions that stays, the largest."""

    def config(self, base: Base, selection: Selection, layers: list[str]) -> Any:
        from peft import OSFConfig

        return OSFConfig(effective_rank=self.kept, target_modules=layers, task_type="CAUSAL_LM")

    def count(self, base: Base, selection: Selection) -> int:
        total = 0
        for outputs, inputs in self.shapes(base, selection):
            free = min(outputs, inputs) - int(min(outputs, inputs) * self.kept)
            total += free * (outputs + inputs + 1)
        return total
