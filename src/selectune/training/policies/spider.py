"""After each step, weights go back to the base's unless their gradients say more than their size.

Knows: the two ranks of an entry, the blend that they make. Does not know: how a step is made.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from selectune.training.policies.masked import largest
from selectune.training.policies.policy import Policy, Stage


class Spider(Policy):
    """Blends each weight with the base's: for its magnitude there, against the gradients added up since the start."""

    name: ClassVar[str] = "spider"
    paper: ClassVar[str] = "Learn from Downstream and Be Yourself in Multimodal LLM Fine-Tuning, ICML 2025, arXiv 2411.10928"
    summary: ClassVar[str] = "After each step, weights are pulled back to the base's unless their gradients outrank their size."
    departs: ClassVar[str] = (
        "Tensors whose entries are all alike count as average throughout (the sample deviation there is 0). Where a part of a tensor trains, "
        "entries are ranked among those that do."
    )
    copies: ClassVar[int] = 3

    mask: Literal["ranked", "magnitude"] = "ranked"
    """``ranked``: gradient against magnitude. ``magnitude``: the paper's baseline, the larger half of each tensor stays as it was."""

    def begin(self, stage: Stage) -> None:
        stage.passing["base"] = stage.values()
        if self.mask == "ranked":
            stage.tensors = {name: torch.zeros_like(value) for name, value in stage.passing["base"].items()}

    def after_step(self, stage: Stage) -> None:
        for name, value, gradient in stage.gradients():
            base = stage.passing["base"][name]
            value.copy_(torch.lerp(base, value, self._share(stage, name, base, gradient)))

    def _share(self, stage: Stage, name: str, base: Tensor, gradient: Tensor) -> Tensor:
        if self.mask == "magnitude":
            return 1 - largest(base.abs(), 0.5)
        return blend(base, stage.tensors[name].add_(gradient))


def blend(base: Tensor, gradients: Tensor) -> Tensor:
    """Return the share of the trained value in each entry.

    Args:
        base: the base's weights. gradients: added up with their signs.
    """
    magnitude = _rank(base.abs())
    gradient = _rank(gradients.abs()) if gradients.any() else torch.zeros_like(gradients)
    share = torch.where(gradient > magnitude, gradient / (magnitude + gradient), 0.0)
    moved = share > 0
    return (share / share[moved].mean()).clamp(max=1.0) if moved.any() else share


def _rank(sizes: Tensor) -> Tensor:
    """The sigmoid of the standard score."""
    spread = sizes.std() if sizes.numel() > 1 else sizes.new_zeros(())
    return torch.sigmoid((sizes - sizes.mean()) / spread) if spread > 0 else torch.full_like(sizes, 0.5)
