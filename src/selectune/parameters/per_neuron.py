"""The best inputs of every output neuron: no neuron is left out.

Knows: the same number of entries for each row of each matrix, by any score. Does not know: any score.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.parameters.factors.allocation import best_of_rows
from selectune.parameters.factors.scores import Settings, scores_of
from selectune.parameters.factors.targets import Target, targets
from selectune.parameters.factors.units import Units, gathered, units
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection


class PerNeuron(ParameterMethod):
    """The k highest-scoring inputs of every output neuron."""

    family: ClassVar[str] = "elements"
    usual_rate: ClassVar[float | None] = 1e-3

    k: Annotated[int, Field(gt=0)] = 1
    """Inputs of each output neuron that train."""
    score: str
    """How an entry is scored, as in ``scored``."""
    examples: Annotated[int, Field(gt=0)] = 256
    """Training records to score on, the first by hash of their content, for scores that need them."""
    targets: str = "linear"
    """Which matrices, as in ``scored``."""

    def select(self, context: Context) -> Selection:
        eligible = targets(context.base, self.targets)
        scores = scores_of(self.score, context, eligible, Settings(examples=self.examples))
        counts = self.counts(eligible, scores)
        return gathered([(group, self.take(group, count)) for group, count in zip(self.rows(context, eligible, scores), counts)])

    def rows(self, context: Context, eligible: list[Target], scores: dict[str, Tensor]) -> list[Units]:
        """Return the entries of each matrix, row by row."""
        return units("element", eligible, scores, context.base.anatomy.blocks)

    def counts(self, eligible: list[Target], scores: dict[str, Tensor]) -> list[int]:
        """Return how many inputs of each neuron train, for each matrix."""
        return [self.k] * len(eligible)

    def take(self, group: Units, count: int) -> Tensor:
        """Return the places of the best inputs of each row.

        Raises:
            UserError: there are not so many inputs.
        """
        if count > group.row:
            raise UserError(f"{count} inputs of each neuron are asked for and '{group.label}' has {group.row}", field="parameters.k",
                            expected=f"at most {group.row}")  # fmt: skip
        return best_of_rows(group.scores.view(-1, group.row), count)
