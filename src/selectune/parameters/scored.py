"""Score, granularity, allocation: three choices that make a method. A paper is a preset of them in a file of its own.

Knows: how the three are put together. Does not know: any of them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.parameters.factors.allocation import Allocation, allocate
from selectune.parameters.factors.scores import Scores, Settings, scores_of
from selectune.parameters.factors.targets import Target, targets
from selectune.parameters.factors.units import Granularity, Reduction, Units, gathered, units
from selectune.parameters.method import Budgeted, Context
from selectune.parameters.selection import Selection


class Scored(Budgeted):
    """The highest-scoring units, as many as the budget holds."""

    name: ClassVar[str] = "scored"
    summary: ClassVar[str] = "The best-scored entries, rows, squares, heads, ...: any score with any granularity and allocation."

    score: str = "gradient"
    """How an entry is scored: ``random``, ``magnitude``, ``low_rank_magnitude``, ``gradient``, ``absolute_gradient``, ``snip``,
    ``force``, ``taylor``, ``fisher``, ``true_fisher``, ..."""
    granularity: Granularity = "element"
    """What is chosen as one."""
    allocation: Allocation = "global"
    """How the budget is shared out: the best anywhere, the same share of each matrix or layer, or the same for every output neuron (``row``)."""
    reduce: Reduction = "mean"
    """A unit's score from those of its entries."""
    side: Annotated[int, Field(gt=0)] = 64
    """Of square blocks."""
    examples: Annotated[int, Field(gt=0)] = 64
    """Training records to score on, the first by hash of their content."""
    rank: Annotated[int, Field(gt=0)] = 16
    """Of the low-rank approximation, for ``low_rank_magnitude``."""

    def select(self, context: Context) -> Selection:
        eligible = targets(context.base, self.targets)
        budget = self.budget(eligible)
        groups = self.units_of(context, eligible, self.score_entries(context, eligible))
        found = gathered(list(zip(groups, self.share_out(groups, budget), strict=True)))
        if not found.parts:
            least = min(group.size for group in groups)
            raise UserError(f"{budget:,} entries hold no {self.granularity}, as they are shared out", field="parameters.density",
                            expected=f"{least:,} entries or more for each {self.granularity}",
                            mend="a larger density, or allocation: global")  # fmt: skip
        return found

    def score_entries(self, context: Context, eligible: list[Target]) -> Scores:
        """Return the scores of all entries that may be chosen."""
        return scores_of(self.score, context, eligible, Settings(examples=self.examples, rank=self.rank))

    def units_of(self, context: Context, eligible: list[Target], scores: Scores) -> list[Units]:
        """Return what may be chosen as one."""
        return units(self.granularity, eligible, scores, context.base.anatomy.blocks, side=self.side, reduce=self.reduce)

    def share_out(self, groups: list[Units], budget: int) -> list[Tensor]:
        """Return which units of each group are chosen."""
        return allocate(groups, budget, self.allocation)


class RandomEntries(Scored):
    """Control: entries at random, by the run's seed; what every chosen mask must beat."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "Control: entries at random, of the same number."
    paper: ClassVar[str] = "PEFT's SHiRA with a random mask; Sparse High Rank Adapters, NeurIPS 2024, arXiv 2406.13175"

    score: str = "random"
