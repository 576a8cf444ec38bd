"""LoRA: a product of two thin matrices beside each chosen linear layer.

Configures PEFT's tuner; nothing of it is written here again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field

from selectune.adapters.form import Form
from selectune.errors import UserError
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base


def whole_layers(base: Base, selection: Selection, form: str) -> list[str]:
    """Return the linear layers of the blocks whose weights were chosen.

    Raises:
        UserError: none was chosen, or parts of one, which an adapter beside the whole cannot heed.
    """
    found = [name for block in base.anatomy.blocks for name, role in block.linears.items()
             if role != "router" and selection.covers(f"{name}.weight")]  # fmt: skip
    if not found:
        raise UserError("no linear layer is among the chosen weights", field="form", expected="whole matrices or blocks",
                        mend="`form: full` trains what was chosen in place")  # fmt: skip
    if any(selection.parts[f"{name}.weight"].form != "whole" for name in found):
        raise UserError(f"'{form}' trains beside whole matrices, and parts of them were chosen", field="form",
                        mend="`form: full` trains the chosen entries in place")  # fmt: skip
    return found


class LoRA(Form):
    """Low-rank adapters on every linear layer whose weight was chosen."""

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685"
    summary: ClassVar[str] = "Low-rank adapters beside the chosen linear layers (PEFT)."
    departs: ClassVar[str] = "On every linear layer, as in QLoRA, instead of the query and value projections alone."
    learning_rate_default: ClassVar[float] = 1e-3

    rank: Annotated[int, Field(gt=0)] = 16
    """Inner width of the two matrices."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The product is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the first matrix."""
    initialisation: str = "default"
    """``default`` (zero product) or one of PEFT's: ``gaussian``, ``pissa``, ``olora``, ``orthogonal``, ..."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA)."""
    magnitude: bool = False
    """Train the columns' magnitudes apart (DoRA)."""

    def apply(self, base: Base, selection: Selection, seed: int) -> Any:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self._targets(base, selection),
            init_lora_weights=True if self.initialisation == "default" else self.initialisation,  # type: ignore[arg-type]
            use_rslora=self.rank_stabilised,
            use_dora=self.magnitude,
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in base.model.modules()),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return get_peft_model(base.model, config)
            except ValueError as error:
                raise UserError(f"PEFT refuses this adapter ({str(error).splitlines()[0]})", field="form") from None

    def count(self, base: Base, selection: Selection) -> int:
        total = 0
        for name in self._targets(base, selection, short=False):
            layer = base.model.get_submodule(name)
            wide = layer.in_features + layer.out_features if hasattr(layer, "in_features") else sum(layer.weight.shape)
            total += self.rank * wide + (getattr(layer, "out_features", 0) if self.magnitude else 0)
        return total

    def save_tensors(self, model: Any, base: Base, selection: Selection, folder: Path) -> None:
        model.save_pretrained(folder, save_embedding_layers=False)

    def _targets(self, base: Base, selection: Selection, short: bool = True) -> list[str]:
        """The linear layers whose weights were chosen; by their last names, when those are all of the base's."""
        linears = [name for block in base.anatomy.blocks for name in block.linears]
        full = whole_layers(base, selection, self.name)
        return sorted({name.rpartition(".")[2] for name in full}) if short and len(full) == len(linears) else full
