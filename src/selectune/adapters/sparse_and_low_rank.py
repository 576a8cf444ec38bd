"""Sparse and low-rank: matrices that were chosen whole get a low-rank adapter, every other chosen entry trains in place.

This is what SPT's choice is made for. Knows: which of the chosen weights get an adapter (PEFT's LoRA, set into the model without its wrapper, since
what trains in place would survive the wrapper's way of switching adapters off); that both are one change of the base's weights in the end: the
products are merged when saved, so the specialist is a folder of changed weights like that of ``full``.
Does not know: why a matrix was chosen whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import nn

from selectune.adapters.form import CHANGED, PLACES, Form
from selectune.parameters.selection import Selection
from selectune.training.partial import entries, train_entries

if TYPE_CHECKING:
    from selectune.models import Base


class SparseAndLowRank(Form):
    """Low-rank adapters on matrices that were chosen whole; all else that was chosen trains in place."""

    name: ClassVar[str] = "sparse_and_low_rank"
    paper: ClassVar[str] = "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning, ICCV 2023, arXiv 2303.08566"
    summary: ClassVar[str] = "Low-rank adapters on matrices that were chosen whole; other chosen entries are trained in place."
    departs: ClassVar[str] = "Entries train in place (the released code adds them to the weight at every pass)."
    learning_rate_default: ClassVar[float] = 3e-4
    rounds: ClassVar[bool] = True

    rank: Annotated[int, Field(gt=0)] = 8
    """Inner width of an adapter's two matrices."""
    alpha: Annotated[float, Field(gt=0)] = 8
    """The product is scaled by alpha / rank."""

    def apply(self, base: Base, selection: Selection, seed: int) -> Any:
        layers, rest = self.split(base, selection)
        trained = train_entries(base.model, rest)
        if layers:
            from peft import LoraConfig, inject_adapter_in_model

            transposed = any(not isinstance(base.model.get_submodule(layer), nn.Linear) for layer in layers)
            config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=layers, fan_in_fan_out=transposed)  # type: ignore[arg-type]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                inject_adapter_in_model(config, base.model)
            for name, value in base.model.named_parameters():
                if ".lora_" in name:
                    value.data = value.data.float()
            for value in trained.values():  # PEFT froze them
                value.requires_grad_(True)
        return base.model

    def count(self, base: Base, selection: Selection) -> int:
        layers, rest = self.split(base, selection)
        return rest.count() + sum(self.rank * sum(selection.parts[f"{layer}.weight"].shape) for layer in layers)

    @torch.no_grad()
    def save_tensors(self, model: Any, base: Base, selection: Selection, folder: Path) -> None:
        parts, weights = entries(model), dict(model.named_parameters())
        values: dict[str, Any] = {}
        for name in selection.names():
            layer, _, key = name.rpartition(".")
            inside = f"{layer}.base_layer.{key}"  # of a layer that has an adapter
            values[name] = parts.get(inside, parts.get(name, weights.get(inside, weights.get(name))))
            if inside in weights and key == "weight":
                values[name] = values[name].float() + model.get_submodule(layer).get_delta_weight("default").float()
        save_file({name: value.to(base.dtype).contiguous() for name, value in values.items()}, folder / CHANGED)
        if not selection.whole():
            selection.save(folder / PLACES)

    @staticmethod
    def split(base: Base, selection: Selection) -> tuple[list[str], Selection]:
        """Return the layers that get an adapter, and the part of the selection that trains in place."""
        linears = {name for block in base.anatomy.blocks for name, role in block.linears.items() if role != "router"}
        layers = [
            name.removesuffix(".weight")
            for name, part in selection.parts.items()
            if part.form == "whole" and name.endswith(".weight") and name.removesuffix(".weight") in linears
        ]
        taken = {f"{layer}.weight" for layer in layers}
        return layers, Selection({name: part for name, part in selection.parts.items() if name not in taken})
