"""Tuners of PEFT that need no more than a configuration: what such forms have in common.

Knows: how a tuner is put around a base and saved, and which layers it may have. Does not know: any tuner's settings.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from selectune.adapters.form import Form
from selectune.adapters.lora import LoRA
from selectune.errors import UserError
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base


class PEFTTuner(Form):
    """A tuner of PEFT on the linear layers of the chosen blocks."""

    @abstractmethod
    def config(self, base: Base, selection: Selection, layers: list[str]) -> Any:
        """Return PEFT's configuration for these layers."""

    def apply(self, base: Base, selection: Selection, seed: int) -> Any:
        from peft import get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                model: Any = get_peft_model(base.model, self.config(base, selection, self.layers(base, selection)))
            except ValueError as error:
                raise UserError(f"PEFT refuses this adapter ({str(error).splitlines()[0]})", field="form") from None
        for value in model.parameters():
            if value.requires_grad:
                value.data = value.data.float()
        return model

    def save_tensors(self, model: Any, base: Base, selection: Selection, folder: Path) -> None:
        model.save_pretrained(folder, save_embedding_layers=False)

    def layers(self, base: Base, selection: Selection) -> list[str]:
        """Return the layers that get an adapter.

        Raises:
            UserError: they are of a kind that PEFT has this tuner not for.
        """
        found = self.chosen(base, selection)
        if not all(isinstance(_plain(base, name), nn.Linear) for name in found):
            raise UserError(f"PEFT has '{self.name}' for linear layers only, and this base's are of another kind", field="form",
                            expected="`full` or `lora`")  # fmt: skip
        return found

    def chosen(self, base: Base, selection: Selection) -> list[str]:
        """Return the layers that a selection means, of whatever kind: all linear layers of the blocks that it touches."""
        return LoRA()._targets(base, selection, short=False)

    def shapes(self, base: Base, selection: Selection) -> list[tuple[int, int]]:
        """Return ``(outputs, inputs)`` of these layers."""
        return [tuple(_plain(base, name).weight.shape) for name in self.layers(base, selection)]


def _plain(base: Base, name: str) -> Any:
    """Return a layer without the adapter around it."""
    module: Any = base.model.get_submodule(name)
    return getattr(module, "base_layer", module)
