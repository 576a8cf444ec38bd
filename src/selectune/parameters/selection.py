"""Which entries of which weights may change.

Knows: whole tensors, rows, columns, square blocks and single elements, by parameter name; set algebra; exact counts; its own
file. Does not know: why an entry was chosen, or in which form it will change.

A part is kept in the coarsest form it was given in, as an int64 index of shape ``(n,)``: row numbers, column numbers, block
numbers (row-major over the grid of ``size x size`` blocks), or flat element numbers. Parts of different forms are combined
as elements.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from selectune.errors import UserError

Form = Literal["whole", "rows", "columns", "blocks", "elements"]


@dataclass(frozen=True, eq=False)
class Part:
    """The chosen entries of one tensor."""

    shape: tuple[int, ...]
    form: Form = "whole"
    index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """``(n,)`` int64, sorted, each once; any iterable of numbers is taken."""
    size: int = 1
    """Side of a block, for form ``blocks``."""
    _moved: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)
    """The index on other devices, kept there."""

    def __post_init__(self) -> None:
        given = self.index if isinstance(self.index, Tensor) else torch.tensor(list(self.index), dtype=torch.int64)
        object.__setattr__(self, "index", given.to("cpu", torch.int64).unique())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Part)
            and self.shape == other.shape
            and (self._same(other) or torch.equal(self.mask(), other.mask()))
        )

    __hash__ = None  # type: ignore[assignment]

    def _same(self, other: Part) -> bool:
        return self._alike(other) and torch.equal(self.index, other.index)

    def _alike(self, other: Part) -> bool:
        return (self.shape, self.form, self.size) == (other.shape, other.form, other.size)

    def mask(self) -> Tensor:
        """Return the entries as a bool tensor of the tensor's shape."""
        if self.form == "whole":
            return torch.ones(self.shape, dtype=torch.bool)
        mask = torch.zeros(self.shape, dtype=torch.bool)
        if self.form == "blocks" and not self.tiles():
            across = -(-self.shape[1] // self.size)
            for block in self.index.tolist():
                row, column = divmod(block, across)
                mask[row * self.size : (row + 1) * self.size, column * self.size : (column + 1) * self.size] = True
        else:
            self.put(mask, torch.ones_like(self.take(mask)))
        return mask

    def count(self) -> int:
        """Return how many entries are chosen."""
        total = math.prod(self.shape)
        if self.form == "whole":
            return total
        if self.form == "rows":
            return len(self.index) * (total // self.shape[0])
        if self.form == "columns":
            return len(self.index) * (total // self.shape[1])
        return len(self.index) if self.form == "elements" else int(self.mask().sum())

    def tiles(self) -> bool:
        """Whether blocks of this size fill the tensor without a rest."""
        return self.shape[0] % self.size == 0 and self.shape[1] % self.size == 0

    def flat(self) -> Part:
        """Return the same entries as single elements."""
        return Part(self.shape, "elements", self.mask().view(-1).nonzero().squeeze(-1))

    def index_on(self, device: torch.device) -> Tensor:
        """Return :attr:`index` on a device; once moved, it stays there too."""
        if device not in self._moved:
            self._moved[device] = self.index.to(device)
        return self._moved[device]

    def take(self, tensor: Tensor) -> Tensor:
        """Return the chosen entries of a tensor of this shape: ``(n, ...)`` rows, ``(rows, n)`` columns, ``(n, size, size)`` blocks,
        ``(n,)`` elements.

        Raises:
            ValueError: blocks that do not fill the tensor; take them as :meth:`flat`.
        """
        if self.form == "whole":
            return tensor.clone()
        index = self.index_on(tensor.device)
        if self.form == "rows":
            return tensor[index]
        if self.form == "columns":
            return tensor[:, index]
        if self.form == "elements":
            return tensor.reshape(-1)[index]
        return self._grid(tensor)[*self._places(index)]

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write entries, in the layout of :meth:`take`, into a tensor in place."""
        values, index = values.to(tensor), self.index_on(tensor.device)
        if self.form == "whole":
            tensor.copy_(values)
        elif self.form == "rows":
            tensor[index] = values
        elif self.form == "columns":
            tensor[:, index] = values
        elif self.form == "elements":
            tensor.view(-1)[index] = values
        else:
            self._grid(tensor)[*self._places(index)] = values

    def _grid(self, tensor: Tensor) -> Tensor:
        """A view of a matrix as blocks: ``(down, across, size, size)``."""
        if not self.tiles():
            raise ValueError(f"blocks of {self.size} do not fill {self.shape}")
        down, across = self.shape[0] // self.size, self.shape[1] // self.size
        return tensor.view(down, self.size, across, self.size).permute(0, 2, 1, 3)

    def _places(self, index: Tensor) -> tuple[Tensor, Tensor]:
        across = self.shape[1] // self.size
        return index // across, index % across


def _elements(mask: Tensor) -> Part | None:
    """Return a mask as a part: whole when everything is chosen, None when nothing is."""
    if not mask.any():
        return None
    if mask.all():
        return Part(tuple(mask.shape))
    return Part(tuple(mask.shape), "elements", mask.view(-1).nonzero().squeeze(-1))


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
        """Combine part by part; two parts of one form stay in it, others become elements."""
        parts = {}
        for name in names:
            one, two = self.parts.get(name), other.parts.get(name)
            if one is None or two is None:  # only of | and -, where the one that is there is the result
                parts[name] = one or two
            elif one.shape != two.shape:
                raise UserError(f"'{name}' is of shape {list(one.shape)} here and {list(two.shape)} there", field="selection",
                                expected="selections of one model")  # fmt: skip
            elif one._alike(two) and one.form != "whole":
                both = torch.cat([one.index, two.index]).unique()
                index = both[rule(torch.isin(both, one.index), torch.isin(both, two.index))]
                parts[name] = Part(one.shape, one.form, index, one.size) if len(index) else None
            else:
                parts[name] = _elements(rule(one.mask(), two.mask()))
        return Selection({name: part for name, part in sorted(parts.items()) if part is not None})

    def save(self, path: Path) -> None:
        """Write the selection as safetensors."""
        tensors = {name: part.index for name, part in self.parts.items()}
        forms = {name: {"form": p.form, "shape": p.shape, "size": p.size} for name, p in self.parts.items()}
        save_file(tensors, path, metadata={"selectune.selection": json.dumps(forms)})

    @classmethod
    def load(cls, path: Path) -> Selection:
        """Read what :meth:`save` wrote."""
        with safe_open(path, framework="pt") as file:
            forms = json.loads(file.metadata()["selectune.selection"])
            return cls(
                {name: Part(tuple(f["shape"]), f["form"], file.get_tensor(name), f["size"]) for name, f in sorted(forms.items())}
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection) or self.parts.keys() != other.parts.keys():
            return False
        return all(part == other.parts[name] for name, part in self.parts.items())

    __hash__ = None  # type: ignore[assignment]


def _shape(value: Any) -> tuple[int, ...]:
    state = getattr(value, "quant_state", None)  # a packed 4-bit weight remembers its true shape
    return tuple(state.shape) if state is not None else tuple(value.shape)
