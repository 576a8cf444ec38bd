"""A model that is ready to train, and all that its training sees.

Knows: which things belong together wherever a training is run, timed or counted. Does not know: how long and in what batches (the recipe's), or
what is done with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from selectune.objectives.objective import Objective
from selectune.training.policies.none import Nothing
from selectune.training.policies.policy import Policy

if TYPE_CHECKING:
    from selectune.parameters.method import Context


@dataclass(frozen=True)
class Trainable:
    """What trains, on what, toward what, and where it is written."""

    model: nn.Module
    """Its trainable parameters require gradients and are fp32."""
    train_rows: list[dict[str, Tensor]]
    """Packed sequences: ``input_ids``, ``labels`` and ``position_ids``, each ``(length,)`` int64."""
    dev_rows: list[dict[str, Tensor]]
    """Likewise, of the development records."""
    objective: Objective
    bfloat16: bool
    """Whether products are computed in bf16."""
    folder: Path
    """Of the run: its plan, its metrics and its checkpoints lie in it."""
    seed: int
    policy: Policy = field(default_factory=Nothing)
    """What acts while the model trains."""
    context: Context | None = None
    """Base and records, for policies that need them."""

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def tokens(self) -> int:
        """In one epoch, padding included."""
        return sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens in each training sequence."""
        return [len(row["input_ids"]) for row in self.train_rows]

    @property
    def dev_lengths(self) -> list[int]:
        """Tokens in each development sequence."""
        return [len(row["input_ids"]) for row in self.dev_rows]
