"""What every form has in common: it makes a base trainable, and saves and loads what was trained.

Knows: the two things a specialist can be on disk: an adapter that plain PEFT loads, or the changed tensors; that it belongs to
one base. Does not know: which weights were chosen, or how training runs.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import load_file, save_file

from selectune import catalogue
from selectune.catalogue import Method
from selectune.errors import UserError
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base
    from selectune.run import Run

CHANGED = "changed.safetensors"
PLACES = "selection.safetensors"  # where changed parts of weights belong
ATTACHED = "attached.safetensors"  # modules beside the base's layers
ORIGIN = "selectune.json"  # which base this belongs to


class Form(Method, ABC):
    """An answer to: in which form do the chosen weights change?"""

    axis: ClassVar[str] = "adapters"
    needs_quantised_base: ClassVar[bool] = False
    learning_rate_default: ClassVar[float]
    keeps_last: ClassVar[bool] = False
    """Whether a run ends with the last checkpoint and not with the best: training heeds a cost that the development loss does not count."""
    rounds: ClassVar[bool] = False
    """Whether the model differs from the base's before training, or from the saved specialist's after it, by rounding in fp32."""

    @abstractmethod
    def apply(self, base: Base, selection: Selection, seed: int) -> Any:
        """Make the base trainable: what trains requires gradients and is fp32, the rest is frozen in its own dtype."""

    @abstractmethod
    def count(self, base: Base, selection: Selection) -> int:
        """Return how many parameters will train."""

    @abstractmethod
    def save_tensors(self, model: Any, base: Base, selection: Selection, folder: Path) -> None:
        """Write what was trained as safetensors."""

    def save(self, model: Any, base: Base, selection: Selection, folder: Path) -> None:
        """Write the specialist: what was trained, and which base it belongs to."""
        self.save_tensors(model, base, selection, folder)
        write_origin(folder, base.spec, base.fingerprint, self.describe(), base.quantised)


def write_origin(folder: Path, base: str, fingerprint: str, form: dict[str, Any], quantised: bool = False) -> None:
    """Write which base a specialist belongs to, and in which form it was trained."""
    origin = {"base": base, "fingerprint": fingerprint, "form": form, "quantised": quantised}
    (folder / ORIGIN).write_text(json.dumps(origin, indent=1), encoding="utf-8")


def read_origin(folder: Path, base: Base | None = None) -> dict[str, Any]:
    """Read what :func:`write_origin` wrote.

    Raises:
        UserError: the folder holds no specialist, or one of another base than the one given.
    """
    if not (folder / ORIGIN).is_file():
        raise UserError("holds no specialist", file=folder, expected=f"a folder with {ORIGIN}", mend="finish the run first")
    origin: dict[str, Any] = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    if base is not None and origin["fingerprint"] != base.fingerprint:
        raise UserError("belongs to another base", file=folder, expected=f"the base '{origin['base']}' as it was at training")
    return origin


def save_changed(model: Any, selection: Selection, dtype: torch.dtype, folder: Path) -> None:
    """Write changed weights, rounded once to the base's dtype: what is measured is what is exported.

    Of a weight of which a part trained only the part is written, and beside it the selection that says where it belongs.
    """
    from selectune.training.partial import entries

    parts, whole = entries(model), dict(model.named_parameters())
    values = {name: parts[name] if name in parts else whole[name] for name in selection.names()}
    save_file({name: value.detach().to(dtype).contiguous() for name, value in values.items()}, folder / CHANGED)
    if not selection.whole():
        selection.save(folder / PLACES)


def put_changed(model: Any, folder: Path) -> None:
    """Write changed weights into a base in place."""
    parameters = dict(model.named_parameters())
    places = Selection.load(folder / PLACES).parts if (folder / PLACES).is_file() else {}
    with torch.no_grad():
        for name, values in load_file(folder / CHANGED).items():
            part = places.get(name)
            if part is None or part.form == "whole":
                parameters[name].copy_(values)
            else:
                (part if values.dim() > 1 or part.form != "blocks" else part.flat()).put(parameters[name].data, values)


def load_specialist(base: Base, folder: str | Path) -> Any:
    """Put a saved specialist onto its base (which it changes) and return the model, ready to evaluate.

    Raises:
        UserError: the folder holds no specialist, or one of another base.
    """
    folder = Path(folder)
    origin = read_origin(folder, base)
    if (folder / CHANGED).is_file():
        put_changed(base.model, folder)
        model = base.model
    elif (folder / ATTACHED).is_file():
        form: Any = catalogue.create("adapters", origin["form"])
        model = form.load(base, folder)
    else:
        from peft import PeftModel

        from selectune.models.load import dequantise

        if base.quantised and next(base.model.parameters()).device.type == "cpu":
            dequantise(base.model)  # products with 4-bit weights save memory there, and take many times as long
        model = PeftModel.from_pretrained(base.model, folder)
    model.eval()
    return model.requires_grad_(False)


def side_by_side(run: Run, dtype: torch.dtype | str = "fast") -> tuple[Base, Any]:
    """Load a run's base, and its specialist on another copy of it.

    Args:
        dtype: of the weights, see :func:`selectune.models.load_base`.

    Raises:
        UserError: the run has no specialist yet, or its base is not there.
    """
    from selectune.models import load_base

    base, changed = (load_base(run.recipe.base, dtype, run.recipe.trust_remote_code) for _ in range(2))
    return base, load_specialist(changed, run.path("specialist"))
