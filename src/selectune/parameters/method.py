"""What every method of this axis has in common.

Knows: what a method may ask for (``Context``) and what it returns (``Selection``). Does not know: any method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from selectune.catalogue import Method
from selectune.meter import Meter
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.data import Encoder, Record
    from selectune.models import Base


@dataclass
class Context:
    """What a method may ask for."""

    base: Base
    encoder: Encoder | Any
    train: list[Record]
    dev: list[Record]
    generator: torch.Generator
    meter: Meter
    block_scores: dict[int, float] = field(default_factory=dict)
    """Scores of blocks, left here by a method that has them."""
    examples_scored: int = 0


class ParameterMethod(Method, ABC):
    """An answer to: which weights may change?"""

    axis: ClassVar[str] = "parameters"

    @abstractmethod
    def select(self, context: Context) -> Selection:
        """Choose entries of the base's weights."""
