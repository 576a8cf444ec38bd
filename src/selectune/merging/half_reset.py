"""Half reset: after training, a random half of the matrices goes back to the base, and what was learnt mostly stays.

Knows: that the draw is half fine-tuning's (``parameters/half.py``), and that a delta without some tensors is the reset specialist. A recipe names
it (``finish: half_reset``), and any delta can be reset later.
Does not know: how the specialist was trained.

Source: the motivating experiment of *HFT: Half Fine-Tuning for Large Language Models*, ACL 2025, arXiv 2404.18466.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field

from selectune.merging.delta import Delta
from selectune.merging.method import Finish
from selectune.parameters.half import Level, draw
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base
    from selectune.parameters.method import Context


class HalfReset(Finish):
    """A random half of the matrices of every block goes back."""

    name: ClassVar[str] = "half_reset"
    paper: ClassVar[str] = "HFT: Half Fine-Tuning for Large Language Models, ACL 2025, arXiv 2404.18466"
    summary: ClassVar[str] = "A random half of each block's matrices and norms returns to the base's values."
    departs: ClassVar[str] = (
        "Ratios other than one half are not in the paper: a share that is no whole number is evened out over the blocks."
    )

    level: Level = "category"
    """Where halves are drawn: among like matrices of a block, among blocks, or among all matrices and norms."""
    ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share that returns."""
    balanced: bool = False
    """Only draws whose number of entries comes closest to the ratio."""

    @torch.no_grad()
    def finish(self, model: Any, context: Context) -> dict[str, Any]:
        reset = draw(context.base.anatomy, context.generator, level=self.level, ratio=self.ratio, balanced=self.balanced)
        values, originals = dict(model.named_parameters()), dict(context.base.model.named_parameters())
        returned = sum(int((values[name] != originals[name]).sum()) for name in reset)
        for name in reset:
            values[name].copy_(originals[name])
        return {"weights returned": returned}


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
