"""LIFT: the largest entries of each matrix after its rank was reduced train.

What a few singular directions make of a matrix tells which of its weights carry something. The paper chooses anew every few hundred steps; here
the choice is made once, and a policy renews it.

Knows: the share of each matrix: a density, or as many entries as LoRA of some rank would train. Does not know: the score, or renewal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.parameters.factors.allocation import Allocation, quotas
from selectune.parameters.factors.targets import Target
from selectune.parameters.factors.units import Units
from selectune.parameters.scored import Scored


class LIFT(Scored):
    """The largest entries of each matrix's best approximation of low rank."""

    name: ClassVar[str] = "lift"
    family: ClassVar[str] = "elements"
    usual_rate: ClassVar[float | None] = 5e-4
    paper: ClassVar[str] = (
        "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction, ICML 2025, arXiv 2506.00772"
    )
    summary: ClassVar[str] = "The largest entries of each matrix after its rank was reduced."
    departs: ClassVar[str] = (
        "A density of 5 % is the default: the paper's budget (LoRA of rank 128) would take up to 89 % of the matrices of a 135M base. Exact "
        "singular values. Chosen once; the policy `refresh` renews the choice. AdamW's rates of decay and the schedule are the trainer's."
    )

    score: str = "low_rank_magnitude"
    """How an entry is scored; ``magnitude`` is the paper's control."""
    allocation: Allocation = "matrix"
    """The same share of each matrix."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the weights in ``targets`` that train."""
    lora_rank: Annotated[int, Field(gt=0)] | None = None
    """Instead: as many entries of each matrix as LoRA of this rank has, (outputs + inputs) x rank, and never more than there are."""
    rank: Annotated[int, Field(gt=0)] = 32
    """That matrices are reduced to."""

    def budget(self, targets: Sequence[Target]) -> int:
        if self.lora_rank is None:
            return super().budget(targets)
        if self.entries is not None:
            raise UserError("two budgets are given: lora_rank and entries", field="parameters.lora_rank", expected="one of them")
        if self.granularity != "element" or self.allocation != "matrix":
            raise UserError(f"lora_rank counts the entries of each matrix, and not {self.granularity}s by {self.allocation}",
                            field="parameters.lora_rank", expected="granularity: element, allocation: matrix",
                            mend="remove them, or name a density")  # fmt: skip
        return sum(
            self._like_lora(target.count // width, width)
            for target in targets
            for width in [target.shape[-1 - target.transposed]]
        )

    def share_out(self, groups: list[Units], budget: int) -> list[Tensor]:
        if self.lora_rank is None:
            return super().share_out(groups, budget)
        return quotas(groups, [self._like_lora(len(group.scores) // group.row, group.row) for group in groups])

    def _like_lora(self, outputs: int, inputs: int) -> int:
        """Return how many entries LoRA of the given rank has beside a matrix (a stack of experts counts as one tall matrix)."""
        return min((outputs + inputs) * (self.lora_rank or 0), outputs * inputs)
