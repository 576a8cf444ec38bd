"""In place: the chosen weights themselves are trained, whole tensors or parts of them.

With every weight chosen this is full fine-tuning; with some blocks chosen, block selection; with rows, columns, blocks of entries or single
entries, a sparse change. The trained copies are fp32 (small updates would be rounded away in bf16); everything else stays frozen in
its own dtype, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from selectune.adapters.form import Form, save_changed
from selectune.parameters.selection import Selection
from selectune.training.partial import train_entries

if TYPE_CHECKING:
    from selectune.models import Base


class Full(Form):
    """Train the chosen weights in place."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "The chosen weights are trained in place (full fine-tuning, blocks, or parts of matrices)."
    learning_rate_default: ClassVar[float] = 1e-4

    def apply(self, base: Base, selection: Selection, seed: int) -> Any:
        train_entries(base.model, selection)
        return base.model

    def count(self, base: Base, selection: Selection) -> int:
        return selection.count()

    def save_tensors(self, model: Any, base: Base, selection: Selection, folder: Path) -> None:
        save_changed(model, selection, base.dtype, folder)
