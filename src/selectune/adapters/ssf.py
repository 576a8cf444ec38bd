"""SSF: what comes out of every layer and norm of the chosen blocks is scaled and shifted, feature by feature.

Knows: the scale and shift, and how they are folded into the layer. Does not know: which blocks were chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from selectune.adapters.attached import AttachedForm, Attachment, Settings, is_transposed, touched
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base


class SSF(AttachedForm):
    """A scale and a shift after every layer."""

    name: ClassVar[str] = "ssf"
    paper: ClassVar[str] = (
        "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning, NeurIPS 2022, arXiv 2210.08823"
    )
    summary: ClassVar[str] = (
        "Scales and shifts of what every layer and norm of the chosen blocks gives; folded into them afterwards."
    )
    departs: ClassVar[str] = (
        "Starts at scale 1 and shift 0 without noise, so that training starts at the base. A norm without a bias is only scaled: a shift of it "
        "would be a shift of the layers that follow, which have their own."
    )
    learning_rate_default: ClassVar[float] = 2e-3

    shift: bool = True
    """Whether to shift too; without, every architecture has room for the folded weights."""

    def places(self, base: Base, selection: Selection) -> dict[str, Settings]:
        layers = [name for block in touched(base, selection) for name, role in block.linears.items() if role != "router"]
        norms = {name.rpartition(".")[0] for block in touched(base, selection) for name in block.norms}
        norms |= {name.rpartition(".")[0] for name in base.anatomy.norms if selection.covers(name)}
        return {name: {} for name in layers} | {name: {"norm": True} for name in sorted(norms)}

    def build(self, layer: Any, settings: Settings, seed: int) -> Attachment:
        width = layer.weight.shape[1 if is_transposed(layer) else 0]
        shifted = self.shift and ("norm" not in settings or getattr(layer, "bias", None) is not None)
        return ScaleAndShift(width, shifted)


class ScaleAndShift(Attachment):
    """``scale * y + shift``."""

    def __init__(self, width: int, shifted: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width)) if shifted else None

    def after(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        changed = output.float() * self.scale
        return (changed if self.shift is None else changed + self.shift).to(output.dtype)

    def fold(self, layer: Any) -> Tensor | None:
        offset = _offset(layer) if layer.weight.dim() == 1 else 0.0
        scale = self.scale if layer.weight.dim() == 1 or is_transposed(layer) else self.scale[:, None]
        layer.weight.copy_((layer.weight.float() + offset) * scale - offset)
        if getattr(layer, "bias", None) is not None:
            layer.bias.copy_(layer.bias.float() * self.scale)
        return self.shift


def _offset(norm: Any) -> float:
    """Return what a norm adds to its weight before it multiplies by it: 1 where a weight of zeros does not silence it (Gemma's, for instance)."""
    kept = norm.weight.clone()
    norm.weight.zero_()
    found = type(norm).forward(norm, torch.arange(1.0, len(kept) + 1, device=kept.device, dtype=kept.dtype)[None])
    norm.weight.copy_(kept)
    return float((found if getattr(norm, "bias", None) is None else found - norm.bias).abs().max() > 0)
