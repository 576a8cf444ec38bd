"""LoFiT: an offset is added to the output of each chosen attention head, before the output projection.

A head is chosen when the columns of the output projection that belong to it are (by the method ``lofit`` of the parameters, for instance).
Knows: the offset, and how it is folded into a bias of the output projection. Does not know: why a head was chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from selectune.adapters.attached import AttachedForm, Attachment, Settings, is_transposed
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base


class LoFiT(AttachedForm):
    """A constant offset for each chosen head."""

    name: ClassVar[str] = "lofit"
    paper: ClassVar[str] = "LoFiT: Localized Fine-tuning on LLM Representations, NeurIPS 2024, arXiv 2406.01563"
    summary: ClassVar[str] = "An offset for the output of each chosen attention head; folded into a bias afterwards."
    departs: ClassVar[str] = "Offsets start at 0 instead of at random numbers of size 0.001, so that training starts at the base."
    learning_rate_default: ClassVar[float] = 1e-2

    def places(self, base: Base, selection: Selection) -> dict[str, Settings]:
        found: dict[str, Settings] = {}
        for block in base.anatomy.blocks:
            name = next((name for name, role in block.linears.items() if role == "attention_output"), None)
            part = None if name is None else selection.parts.get(f"{name}.weight")
            if name is not None and part is not None:
                inputs = part.mask().any(1 if is_transposed(base.model.get_submodule(name)) else 0)
                heads = inputs.view(block.heads, -1).any(1).nonzero().squeeze(-1).tolist()
                found[name] = {"heads": heads, "of": block.heads}
        return found

    def build(self, layer: Any, settings: Settings, seed: int) -> Attachment:
        width = layer.weight.shape[0 if is_transposed(layer) else 1]
        return Offset(torch.tensor(settings["heads"]), settings["of"], width)


class Offset(Attachment):
    """Adds ``(heads, head size)`` to some heads of a layer's input."""

    def __init__(self, heads: Tensor, of: int, width: int) -> None:
        super().__init__()
        self.of, self.width = of, width
        self.heads: Tensor
        self.register_buffer("heads", heads)
        self.offset = nn.Parameter(torch.zeros(len(heads), width // of))

    def whole(self) -> Tensor:
        """Return the offsets of all heads, ``(inputs,)``."""
        return self.offset.new_zeros(self.of, self.width // self.of).index_copy(0, self.heads, self.offset).view(-1)

    def before(self, layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
        return (inputs[0] + self.whole().to(inputs[0].dtype), *inputs[1:])

    def fold(self, layer: Any) -> Tensor | None:
        weight = layer.weight.t() if is_transposed(layer) else layer.weight
        return weight.float() @ self.whole()
