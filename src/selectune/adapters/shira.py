"""SHiRA: a sparse change beside each frozen matrix; the entries are the chosen ones, or drawn at random where a matrix was chosen whole.

Configures PEFT's tuner; nothing of it is written here again. The tuner has one rank for all layers that fixes how many entries each has, rank x
(outputs + inputs): a layer with fewer chosen entries is filled up with entries that never move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from selectune.adapters.peft_tuner import PEFTTuner
from selectune.errors import UserError
from selectune.parameters.selection import Part, Selection

if TYPE_CHECKING:
    from selectune.models import Base


class SHiRA(PEFTTuner):
    """A sparse change beside each layer: the chosen entries, or as many at random as LoRA would have."""

    name: ClassVar[str] = "shira"
    paper: ClassVar[str] = "Sparse High Rank Adapters, NeurIPS 2024, arXiv 2406.13175"
    summary: ClassVar[str] = (
        "A sparse change beside each layer: the chosen entries; random ones where a matrix was chosen whole (PEFT)."
    )
    learning_rate_default: ClassVar[float] = 1e-3

    rank: Annotated[int, Field(gt=0)] = 16
    """Where matrices were chosen whole: as many entries of each as LoRA of this rank has."""

    def config(self, base: Base, selection: Selection, layers: list[str]) -> Any:
        from peft import ShiraConfig

        rank, found = self._rank(base, selection), {id(base.model.get_submodule(name)): name for name in layers}
        config = ShiraConfig(r=rank, target_modules=layers, task_type="CAUSAL_LM", random_seed=torch.initial_seed())
        at_random = config.mask_fn

        def mask(layer: nn.Module, r: int, **options: Any) -> Tensor:
            part = selection.parts[f"{found[id(layer)]}.weight"]
            if part.form == "whole":
                return at_random(layer, r, **options)  # type: ignore[misc]
            taken = part.mask().view(-1)
            spare = (~taken).nonzero().squeeze(-1)[: r * sum(part.shape) - int(taken.sum())]
            return taken.index_fill(0, spare, True).view(part.shape).to(layer.weight.device)  # type: ignore[arg-type]

        config.mask_fn = mask  # type: ignore[assignment]
        return config

    def apply(self, base: Base, selection: Selection, seed: int) -> Any:
        model = super().apply(base, selection, seed)
        for name in self.layers(base, selection):
            part, layer = selection.parts[f"{name}.weight"], base.model.get_submodule(name)
            if part.form != "whole":
                rows, columns = layer.shira_indices["default"].long()
                chosen = part.mask()[rows.cpu(), columns.cpu()].float().to(rows.device)
                layer.shira_weight["default"].register_hook(lambda gradient, chosen=chosen: gradient * chosen)
        return model

    def count(self, base: Base, selection: Selection) -> int:
        return sum(self._rank(base, selection) * sum(shape) for shape in self.shapes(base, selection))

    def chosen(self, base: Base, selection: Selection) -> list[str]:
        linears = [name for block in base.anatomy.blocks for name, role in block.linears.items() if role != "router"]
        found = [name for name in linears if selection.covers(f"{name}.weight")]
        if not found:
            raise UserError("the chosen weights lie in no linear layer", field="parameters")
        return found

    def _rank(self, base: Base, selection: Selection) -> int:
        """Return the one rank that holds what was chosen of every layer."""
        parts: list[Part] = [selection.parts[f"{name}.weight"] for name in self.layers(base, selection)]
        needed = [self.rank if part.form == "whole" else -(-part.count() // sum(part.shape)) for part in parts]
        for part in parts:
            if max(needed) * sum(part.shape) > part.shape[0] * part.shape[1]:
                raise UserError(f"SHiRA has one rank for all layers, and {max(needed)}, which the densest needs, does not fit all of them",
                                field="form", expected="fewer entries, or the form `full`")  # fmt: skip
        return max(needed)
