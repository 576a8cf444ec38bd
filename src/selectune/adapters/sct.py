"""SCT: a small square map among the chosen output channels of a layer, added to them.

The channels are rows of output projections (of attention or of the MLP) that were chosen, by the method ``sct`` of the parameters for instance.
Knows: the map, and how it is folded into the layer: ``W' = W + E map E^T W``. Does not know: why a channel was chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from selectune.adapters.attached import AttachedForm, Attachment, Settings, is_transposed
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base


class SCT(AttachedForm):
    """A linear map among the chosen channels of a layer's output."""

    name: ClassVar[str] = "sct"
    paper: ClassVar[str] = "SCT: A Simple Baseline for Parameter-Efficient Fine-Tuning via Salient Channels, arXiv 2309.08513"
    summary: ClassVar[str] = (
        "A small map among the chosen (salient) output channels of the projections back into the hidden state."
    )
    departs: ClassVar[str] = (
        "The map starts at zero instead of at random, so that training starts at the base; it acts on what the projection adds to the hidden state "
        "instead of on the hidden state, so that it can be folded into the weights. Biases are off unless asked for."
    )
    learning_rate_default: ClassVar[float] = 2e-3

    bias: bool = False
    """Add a bias to each channel; not every architecture has room for it when it is folded."""

    def places(self, base: Base, selection: Selection) -> dict[str, Settings]:
        found: dict[str, Settings] = {}
        for block in base.anatomy.blocks:
            for name, role in block.linears.items():
                part = selection.parts.get(f"{name}.weight")
                if role in ("attention_output", "down") and part is not None:
                    axis = 1 if is_transposed(base.model.get_submodule(name)) else 0
                    lines = part.mask().any(1 - axis).nonzero().squeeze(-1)
                    found[name] = {"channels": lines.tolist()}
        return found

    def build(self, layer: Any, settings: Settings, seed: int) -> Attachment:
        return ChannelMap(torch.tensor(settings["channels"]), self.bias)


class ChannelMap(Attachment):
    """Adds ``map @ y[channels] + bias`` to some channels of a layer's output."""

    def __init__(self, channels: Tensor, biased: bool) -> None:
        super().__init__()
        self.channels: Tensor
        self.register_buffer("channels", channels)
        self.map = nn.Parameter(torch.zeros(len(channels), len(channels)))
        self.bias = nn.Parameter(torch.zeros(len(channels))) if biased else None

    def after(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        added = nn.functional.linear(output[..., self.channels].to(self.map.dtype), self.map, self.bias)
        return output.index_add(-1, self.channels, added.to(output.dtype))

    def fold(self, layer: Any) -> Tensor | None:
        weight = layer.weight.t() if is_transposed(layer) else layer.weight
        weight[self.channels] += (self.map @ weight[self.channels].float()).to(weight.dtype)
        outputs = len(weight)
        shift = torch.zeros(outputs, device=weight.device)
        if getattr(layer, "bias", None) is not None:
            shift[self.channels] += self.map @ layer.bias[self.channels].float()
        elif self.bias is None:
            return None
        if self.bias is not None:
            shift[self.channels] += self.bias
        return shift
