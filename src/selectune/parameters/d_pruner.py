"""D-Pruner's importance as a choice: entries that matter for the domain, weighed with what general text needs.

The paper keeps the important entries and removes the others; here the important ones train, and the score serves any other granularity too.

Knows: the paper's defaults. Does not know: the score (``factors/inputs.py``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from selectune.parameters.factors.allocation import Allocation
from selectune.parameters.factors.scores import Scores, Settings, scores_of
from selectune.parameters.factors.targets import Target
from selectune.parameters.method import Context
from selectune.parameters.scored import Scored


class DPruner(Scored):
    """The entries of each matrix with the highest dual importance."""

    name: ClassVar[str] = "d_pruner"
    family: ClassVar[str] = "elements"
    paper: ClassVar[str] = "Pruning as a Domain-specific LLM Extractor, NAACL Findings 2024, arXiv 2405.06275"
    summary: ClassVar[str] = (
        "Entries that matter for the domain, weighed with what general text needs (D-Pruner's dual importance)."
    )
    departs: ClassVar[str] = (
        "The score chooses what trains instead of what is kept. It is |u + F w^2 / 2| at the base's weights, with F of single examples; the "
        "released code adds steps of a training up, with constants (2000, 1/1000) and a cube of the weight. Layers see the base's own inputs. "
        "Stacks of experts cannot be scored."
    )

    score: str = "dual_importance"
    """How an entry is scored."""
    allocation: Allocation = "matrix"
    """The same share of each matrix."""
    penalty: Annotated[float, Field(ge=0)] = 0.1
    """Weight of what general text needs."""
    step: Annotated[float, Field(ge=0)] = 0.03
    """Learning rate of the plain step that the score imagines."""

    def score_entries(self, context: Context, eligible: list[Target]) -> Scores:
        return scores_of(self.score, context, eligible, Settings(examples=self.examples, penalty=self.penalty, step=self.step))
