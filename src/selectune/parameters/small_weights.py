"""Small weights: of each matrix the entries nearest to zero train, as in Sparse MeZO.

The paper perturbs only these in zeroth-order training, since a random step in a large weight does the most harm. Its threshold per tensor
is fixed before training; the policy that steps without gradients is another file's.

Knows: the paper's score and defaults. Does not know: how training steps.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from selectune.parameters.factors.allocation import Allocation
from selectune.parameters.scored import Scored


class SmallWeights(Scored):
    """The smallest weights of each matrix."""

    name: ClassVar[str] = "small_weights"
    family: ClassVar[str] = "elements"
    paper: ClassVar[str] = (
        "Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning, NeurIPS 2025, arXiv 2402.15751"
    )
    summary: ClassVar[str] = (
        "Of each matrix the weights nearest to zero (for zeroth-order training: the small ones bear a random step)."
    )
    departs: ClassVar[str] = (
        "Chosen once at the base's weights; the paper compares the present weights with the first threshold at every step. Norms are left out."
    )

    score: str = "small_magnitude"
    """How an entry is scored; ``magnitude`` is the control that the paper finds worst."""
    allocation: Allocation = "matrix"
    """The same share of each matrix."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of each matrix that trains: one less the paper's sparsity."""
