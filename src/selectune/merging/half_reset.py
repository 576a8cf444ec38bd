"""Half reset: after training, a random half of the matrices goes back to the base, and what was learnt mostly stays.

Knows: that the draw is half fine-tuning's (``parameters/half.py``), and that a delta without some tensors is the reset specialist.
Does not know: how the specialist was trained.

Source: the motivating experiment of *HFT: Half Fine-Tuning for Large Language Models*, ACL 2025, arXiv 2404.18466.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from selectune.merging.delta import Delta
from selectune.parameters.half import Level, draw
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base


def half_reset(
    delta: Delta, base: Base, seed: int = 0, *, level: Level = "category", ratio: float = 0.5, balanced: bool = False
) -> Delta:
    """Return a delta without a random share of the base's matrices and norms: these keep the base's values, bit for bit.

    Args:
        delta: of a specialist trained in place. seed: of the draw. level, balanced: as in half fine-tuning. ratio: share that is reset.

    Raises:
        UserError: the delta belongs to another base.
    """
    delta.belongs(base)
    reset = draw(base.anatomy, torch.Generator().manual_seed(seed), level=level, ratio=ratio, balanced=balanced)
    kept = delta.selection.parts.keys() - set(reset)
    return delta.restrict(Selection({name: delta.selection.parts[name] for name in sorted(kept)}))
