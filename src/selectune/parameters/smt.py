"""SMT: square blocks of matrices with the largest gradient train.

The paper adds gradients up while everything is fine-tuned for some steps, then keeps only the best squares. The steps are made on a copy here,
so that the rest of the base is as it was.

Knows: how gradients of a warm-up are added up, the four block scores, budgets for attention and MLP apart.
Does not know: how squares are cut (``factors/units.py``), or how they train.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from selectune.parameters.factors.scores import Scores
from selectune.parameters.factors.targets import ATTENTION, Target, targets
from selectune.parameters.factors.trial import trial
from selectune.parameters.factors.units import Granularity, Reduction, Units, gathered, units
from selectune.parameters.method import Context
from selectune.parameters.scored import Scored
from selectune.parameters.selection import Selection

_REDUCTIONS: dict[str, Reduction] = {"mean_abs": "absolute_mean", "abs_mean": "mean", "L1": "sum", "L2": "norm"}


class SMT(Scored):
    """The squares of matrices with the largest gradient, added up over a warm-up."""

    name: ClassVar[str] = "smt"
    family: ClassVar[str] = "elements"
    paper: ClassVar[str] = "Sparse Matrix in Large Language Model Fine-tuning, ICLR 2025, arXiv 2405.15525"
    summary: ClassVar[str] = "Square blocks of matrices with the largest gradient over a short warm-up."
    departs: ClassVar[str] = (
        "The warm-up trains the matrices that may be chosen, of a copy, and the base starts as it was (as released, what the warm-up changed "
        "stays). Squares of 64: 256 does not divide a small model's matrices. All linear layers, the attention's output too, but no stacks of "
        "experts. The run's rate is 1e-3 where none is named (the paper: 1e-4 to 5e-4)."
    )

    score: str = "signed_gradient"
    """How an entry is scored without a warm-up (``steps: 0``)."""
    granularity: Granularity = "square"
    """What is chosen as one."""
    block_score: Literal["mean_abs", "abs_mean", "L1", "L2"] = "mean_abs"
    """Of a square's added-up gradient: the size of the mean (as released: opposite signs cancel), the mean or sum of sizes, or the norm."""
    attention_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the budget that the attention gets; left out: the best squares anywhere."""
    steps: Annotated[int, Field(ge=0)] = 50
    """Of the warm-up; 0: gradients at the base's weights, over ``examples``."""
    learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    """Of the warm-up."""

    def score_entries(self, context: Context, eligible: list[Target]) -> Scores:
        if not self.steps:
            return super().score_entries(context, eligible)
        return context.once(("smt", self.steps, self.learning_rate, self.targets), lambda: self._added_up(context, eligible))

    def _added_up(self, context: Context, eligible: list[Target]) -> Scores:
        """Return the sum of the gradients of a warm-up."""
        device = context.base.model.device
        total: dict[str, Tensor] = {target.name: torch.zeros(target.shape, device=device) for target in eligible}

        def add(step: int, trained: dict[str, Tensor]) -> None:
            for name, value in trained.items():
                if value.grad is not None:
                    total[name].add_(value.grad)

        everything = Selection.of(context.base.model, total)
        trial(context, everything, steps=self.steps, learning_rate=self.learning_rate, before_step=add)
        return total

    def units_of(self, context: Context, eligible: list[Target], scores: Scores) -> list[Units]:
        how = _REDUCTIONS[self.block_score]
        if how != "absolute_mean":
            scores = {name: value.abs() for name, value in scores.items()}
        return units(self.granularity, eligible, scores, context.base.anatomy.blocks, side=self.side, reduce=how)

    def select(self, context: Context) -> Selection:
        if self.attention_share is None:
            return super().select(context)
        eligible = targets(context.base, self.targets)
        budget = self.budget(eligible)
        scores = self.score_entries(context, eligible)
        attention = round(budget * self.attention_share)
        chosen: list[tuple[Units, Tensor]] = []
        for inside, part in ((True, attention), (False, budget - attention)):
            side = [target for target in eligible if (target.role in ATTENTION) == inside]
            groups = self.units_of(context, side, scores)
            chosen += zip(groups, self.share_out(groups, part), strict=True) if groups else []
        return gathered(chosen)
