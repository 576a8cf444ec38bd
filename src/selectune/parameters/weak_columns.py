"""Weak columns: the inputs of each layer that rounding would hurt most are the ones that train.

OWQ keeps these columns in full precision when it rounds all others, and trains them alone. They are worth training without rounding too: the
columns that large inputs meet.

Knows: the same number of columns for each layer, fewer for the MLP if asked. Does not know: the score (``factors/inputs.py``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from selectune.errors import UserError
from selectune.parameters.factors.allocation import quotas
from selectune.parameters.factors.inputs import layers_of
from selectune.parameters.factors.scores import Settings, scores_of
from selectune.parameters.factors.targets import ATTENTION, targets
from selectune.parameters.factors.units import gathered, units
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection


class WeakColumns(ParameterMethod):
    """The k input columns of each linear layer with the largest H_jj E_j: input moment times error of rounding."""

    name: ClassVar[str] = "weak_columns"
    family: ClassVar[str] = "heads-neurons-channels"
    paper: ClassVar[str] = "OWQ: Outlier-Aware Weight Quantization, AAAI 2024, arXiv 2306.02272"
    summary: ClassVar[str] = "The input columns of each layer that rounding to a few bits would hurt most."
    departs: ClassVar[str] = (
        "The other columns stay as they are instead of being rounded (OPTQ), so every layer sees the base's own inputs; a number of "
        "columns is given instead of an average number of bits. Stacks of experts are left out."
    )

    k: Annotated[int, Field(gt=0)] = 8
    """Columns of each layer."""
    mlp_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Layers of the MLP train this share of k (the paper: 0.375 for LLaMA)."""
    bits: Annotated[int, Field(gt=0, le=8)] = 4
    """Of the rounding that columns are judged by: each row between its own least and largest value."""
    examples: Annotated[int, Field(gt=0)] = 128
    """General conversations (built in) to see inputs of, the first by hash of their content."""
    targets: str = "linear"
    """Which layers, as in ``scored``."""

    def select(self, context: Context) -> Selection:
        eligible = layers_of([target for target in targets(context.base, self.targets) if len(target.shape) == 2])
        counts = [self.k if target.role in ATTENTION else max(1, round(self.k * self.mlp_share)) for target in eligible]
        scores = scores_of("rounding_error", context, eligible, Settings(examples=self.examples, bits=self.bits))
        groups = units("column", eligible, scores, context.base.anatomy.blocks, reduce="sum")
        for group, count in zip(groups, counts, strict=True):
            if count > len(group.scores):
                raise UserError(f"{count} columns are asked for and '{group.label}' has {len(group.scores)}", field="parameters.k",
                                expected=f"at most {len(group.scores)}")  # fmt: skip
        return gathered(list(zip(groups, quotas(groups, counts), strict=True)))
