"""In place: the chosen tensors themselves are trained.

With every weight chosen this is full fine-tuning; with some blocks chosen, block selection. The trained copies are fp32
(small updates would be rounded away in bf16); everything else stays frozen in its own dtype, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from selectune.adapters.form import Form, save_changed
from selectune.errors import UserError
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base


class Full(Form):
    """Train the chosen tensors in place."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "The chosen tensors are trained in place (full fine-tuning, or block selection)."
    learning_rate_default: ClassVar[float] = 1e-4

    def apply(self, base: Base, selection: Selection, seed: int) -> Any:
        if not selection.whole():
            raise UserError("this selection has parts of tensors, and in place only whole tensors train", field="form")
        model = base.model
        model.requires_grad_(False)
        chosen = {name: dict(model.named_parameters())[name] for name in selection.names()}
        trained = {id(value): nn.Parameter(value.detach().float()) for value in chosen.values()}
        for module in model.modules():  # a tied weight is in two modules and stays one
            for key, value in list(module._parameters.items()):
                if value is not None and id(value) in trained:
                    module._parameters[key] = trained[id(value)]
        return model

    def count(self, base: Base, selection: Selection) -> int:
        return selection.count()

    def save_tensors(self, model: Any, base: Base, folder: Path) -> None:
        names = [name for name, value in model.named_parameters() if value.requires_grad]
        save_changed(model, names, base.dtype, folder)
