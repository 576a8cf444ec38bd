"""Which entries of which weights may change.

Knows: whole tensors, rows, columns, square blocks and single elements, by parameter name; set algebra; exact counts; its own
file. Does not know: why an entry was chosen, or in which form it will change.

A part is kept in the coarsest form it was given in, as an int64 index of shape ``(n,)``: row numbers, column numbers, block
numbers (row-major over the grid of ``size x size`` blocks), or flat element numbers. Parts of different forms are combined
as elements.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Form = Literal["whole", "rows", "columns", "blocks", "elements"]


@dataclass(frozen=True)
class Part:
    """The chosen entries of one tensor."""

    shape: tuple[int, ...]
    form: Form = "whole"
    index: tuple[int, ...] = ()
    size: int = 1
    """Side of a block, for form ``blocks``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", tuple(sorted(set(int(i) for i in self.index))))

    def mask(self) -> Tensor:
        """Return the entries as a bool tensor of the tensor's shape."""
        if self.form == "whole":
            return torch.ones(self.shape, dtype=torch.bool)
        mask = torch.zeros(self.shape, dtype=torch.bool)
        index = torch.tensor(self.index, dtype=torch.int64)
        if self.form == "rows":
            mask[index] = True
        elif self.form == "columns":
            mask[:, index] = True
        elif self.form == "elements":
            mask.view(-1)[index] = True
        else:
            across = -(-self.shape[1] // self.size)
            for block in self.index:
                row, column = divmod(block, across)
                mask[row * self.size : (row + 1) * self.size, column * self.size : (column + 1) * self.size] = True
        return mask

    def count(self) -> int:
        """Return how many entries are chosen."""
        total = 1
        for length in self.shape:
            total *= length
        if self.form == "whole":
            return total
        if self.form == "rows":
            return len(self.index) * (total // self.shape[0])
        if self.form == "columns":
            return len(self.index) * (total // self.shape[1])
        return len(self.index) if self.form == "elements" else int(self.mask().sum())


def _elements(mask: Tensor) -> Part | None:
    """Return a mask as a part: whole when everything is chosen, None when nothing is."""
    if not mask.any():
        return None
    if mask.all():
        return Part(tuple(mask.shape))
    return Part(tuple(mask.shape), "elements", tuple(mask.view(-1).nonzero().squeeze(-1).tolist()))


@dataclass(frozen=True)
class Selection:
    """Parts of tensors, by parameter name. Equal selections compare equal."""

    parts: Mapping[str, Part]

    @classmethod
    def all(cls, model: nn.Module) -> Selection:
        """Choose every parameter (tied weights appear once)."""
        return cls.of(model, [name for name, _ in model.named_parameters()])

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str]) -> Selection:
        """Choose whole tensors by name.

        Raises:
            KeyError: the model has no such parameter.
        """
        shapes = {name: _shape(value) for name, value in model.named_parameters()}
        return cls({name: Part(shapes[name]) for name in sorted(set(names))})

    def names(self) -> list[str]:
        """Return the parameters that are touched, sorted."""
        return sorted(self.parts)

    def covers(self, name: str) -> bool:
        """Whether any entry of this parameter is chosen."""
        return name in self.parts

    def count(self) -> int:
        """Return the number of chosen entries."""
        return sum(part.count() for part in self.parts.values())

    def mask(self, name: str) -> Tensor:
        """Return the chosen entries of a covered parameter as a bool tensor."""
        return self.parts[name].mask()

    def whole(self) -> bool:
        """Whether every touched tensor is chosen whole."""
        return all(part.form == "whole" for part in self.parts.values())

    def __or__(self, other: Selection) -> Selection:
        return self._combine(other, lambda left, right: left | right, self.parts.keys() | other.parts.keys())

    def __and__(self, other: Selection) -> Selection:
        return self._combine(other, lambda left, right: left & right, self.parts.keys() & other.parts.keys())

    def __sub__(self, other: Selection) -> Selection:
        return self._combine(other, lambda left, right: left & ~right, self.parts.keys())

    def _combine(self, other: Selection, rule: Any, names: Iterable[str]) -> Selection:
        parts = {}
        for name in names:
            shape = (self.parts.get(name) or other.parts[name]).shape
            nothing = torch.zeros(shape, dtype=torch.bool)
            left = self.mask(name) if name in self.parts else nothing
            right = other.mask(name) if name in other.parts else nothing
            part = _elements(rule(left, right))
            if part is not None:
                parts[name] = part
        return Selection(dict(sorted(parts.items())))

    def save(self, path: Path) -> None:
        """Write the selection as safetensors."""
        tensors = {name: torch.tensor(part.index, dtype=torch.int64) for name, part in self.parts.items()}
        forms = {name: {"form": p.form, "shape": p.shape, "size": p.size} for name, p in self.parts.items()}
        save_file(tensors, path, metadata={"selectune.selection": json.dumps(forms)})

    @classmethod
    def load(cls, path: Path) -> Selection:
        """Read what :meth:`save` wrote."""
        with safe_open(path, framework="pt") as file:
            forms = json.loads(file.metadata()["selectune.selection"])
            return cls(
                {
                    name: Part(tuple(f["shape"]), f["form"], tuple(file.get_tensor(name).tolist()), f["size"])
                    for name, f in sorted(forms.items())
                }
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection) or self.parts.keys() != other.parts.keys():
            return False
        return all(torch.equal(self.mask(name), other.mask(name)) for name in self.parts)

    __hash__ = None  # type: ignore[assignment]


def _shape(value: Any) -> tuple[int, ...]:
    state = getattr(value, "quant_state", None)  # a packed 4-bit weight remembers its true shape
    return tuple(state.shape) if state is not None else tuple(value.shape)
