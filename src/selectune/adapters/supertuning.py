"""Super-Tuning: the largest weights of each layer train beside the frozen matrix, with a low-rank adapter if asked (Supra).

Configures PEFT's tuner; nothing of it is written here again. Its support is its own: of the selection only the blocks count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from selectune.adapters.peft_tuner import PEFTTuner
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base


class SuperTuning(PEFTTuner):
    """The largest weights of each layer of the chosen blocks."""

    name: ClassVar[str] = "supertuning"
    paper: ClassVar[str] = "Super-Tuning: From Activation-Aware Pruning to Sparse Fine-Tuning, 2026, arXiv 2607.09287"
    summary: ClassVar[str] = "The largest weights of each layer, and a low-rank adapter if asked (PEFT)."
    departs: ClassVar[str] = "Weights are chosen by their size alone, which PEFT has; the paper also scores by activations."
    learning_rate_default: ClassVar[float] = 1e-3

    density: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of each layer's weights that trains."""
    smallest: bool = False
    """The smallest weights instead of the largest."""
    rank: Annotated[int, Field(gt=0)] | None = None
    """Of a low-rank adapter beside them; left out: none."""

    def config(self, base: Base, selection: Selection, layers: list[str]) -> Any:
        from peft import SupertuningConfig

        return SupertuningConfig(
            sparsity=1 - self.density, select_top=not self.smallest, r=self.rank, target_modules=layers, task_type="CAUSAL_LM"
        )

    def count(self, base: Base, selection: Selection) -> int:
        share = 1 - (1 - self.density)  # rounded as PEFT's sparsity is
        return sum(int(m * n * share) + (self.rank or 0) * (m + n) for m, n in self.shapes(base, selection))
