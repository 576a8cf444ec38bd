"""Sparse deltas: what a specialist that was trained in place differs by, as a thing of its own.

Knows: which entries of a base's weights differ, what they were and what they are; that this is all it takes to make the specialist
from the base and the base from the specialist, bit for bit; how changes add up on the union of supports. A support is a
:class:`Selection`, and its algebra is there. The folder is that of a specialist, with the base's own values beside the changed ones.
Does not know: how the entries were chosen or trained, or which delta is in use (``serving.py``).

Source: the composable differences of *Composable Sparse Fine-Tuning for Cross-Lingual Transfer*, ACL 2022, arXiv 2110.07560. There a
difference is added and subtracted, exact up to rounding; here both values of an entry are kept, and nothing is rounded but a sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selectune.adapters.form import CHANGED, PLACES, read_origin, write_origin
from selectune.errors import UserError
from selectune.parameters.selection import Part, Selection

if TYPE_CHECKING:
    from selectune.models import Base

ORIGINAL = "original.safetensors"  # the base's values of the entries that changed


@dataclass(frozen=True, eq=False)
class Delta:
    """Entries of a base's weights, as they were and as they are."""

    spec: str
    """How the base was named."""
    fingerprint: str
    """Of the base."""
    selection: Selection
    """The support: which entries."""
    before: Mapping[str, Tensor]
    """The base's values by parameter name, in the layout of :meth:`Part.take` and the dtype of ``after``."""
    after: Mapping[str, Tensor]
    """The specialist's values, likewise."""

    @classmethod
    def of(cls, base: Base, specialist: nn.Module) -> Delta:
        """Take the difference of a model from its base: the entries whose bits differ, in the wider of the two dtypes.

        Raises:
            UserError: the two have other parameters, or parameters of other shapes.
        """
        ours, theirs = _weights(base), dict(specialist.named_parameters())
        for name in ours.keys() | theirs.keys():
            if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
                raise UserError(f"is no specialist of '{base.spec}': '{name}' is in one of them only, or has another shape",
                                expected="the same architecture and the same tying of weights")  # fmt: skip
        parts, before, after = {}, {}, {}
        for name, one in ours.items():
            one, other = _alike(one.detach(), theirs[name].detach().to(one.device))
            part = _coarsest(differ(one, other))
            if part is not None:
                parts[name], before[name], after[name] = part, part.take(one).cpu(), part.take(other).cpu()
        return cls(base.spec, base.fingerprint, Selection(dict(sorted(parts.items()))), before, after)

    @classmethod
    def load(cls, folder: str | Path, base: Base | None = None) -> Delta:
        """Read the folder of a delta, or of any specialist that was trained in place.

        Every entry that trained is in the support, changed or not.

        Args:
            folder: what :meth:`save` wrote, or ``specialist`` of a run.
            base: where the base's values come from, if the folder does not keep them.

        Raises:
            UserError: no specialist, one of another base, an adapter, or the base is needed and not given, or carries the specialist.
        """
        folder = Path(folder)
        origin = origin_in_place(folder, base)
        after = load_file(folder / CHANGED)
        places = Selection.load(folder / PLACES).parts if (folder / PLACES).is_file() else {}
        parts = {name: _tiled(places.get(name) or Part(tuple(values.shape))) for name, values in sorted(after.items())}
        if (folder / ORIGINAL).is_file():
            before = load_file(folder / ORIGINAL)
        elif base is not None:
            weights = _weights(base)
            before = {name: part.take(weights[name].detach()).cpu() for name, part in parts.items()}
            if after and not any(differ(*_alike(before[name], values)).any() for name, values in after.items()):
                raise UserError("changes nothing: the base is its specialist already, or training changed nothing", file=folder,
                                expected=f"'{origin['base']}' as it was at training", mend="load the base anew")  # fmt: skip
        else:
            raise UserError(
                f"keeps no values of its base (no {ORIGINAL})", file=folder, mend=f"load the base '{origin['base']}' too"
            )
        pairs = {name: _alike(before[name], values) for name, values in after.items()}
        return cls(
            origin["base"],
            origin["fingerprint"],
            Selection(parts),
            {name: pair[0] for name, pair in pairs.items()},
            {name: pair[1] for name, pair in pairs.items()},
        )

    def save(self, folder: Path, original: bool = True) -> None:
        """Write the delta into a folder, which :func:`selectune.adapters.load_specialist` reads too.

        Args:
            original: with the base's values beside the changed ones.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for file, values in ((CHANGED, self.after), (ORIGINAL, self.before))[: 1 + original]:
            save_file({name: value.contiguous() for name, value in values.items()}, folder / file)
        if not self.selection.whole():
            self.selection.save(folder / PLACES)
        write_origin(folder, self.spec, self.fingerprint, {"method": "full"})

    def count(self) -> int:
        """Return the number of entries in the support."""
        return self.selection.count()

    def changes(self, name: str) -> Tensor:
        """Return after - before of a parameter's entries, in fp64."""
        return self.after[name].double() - self.before[name].double()

    def changed(self) -> Delta:
        """Return the delta without the entries that are in the support and did not change."""
        masks = {}
        for name, part in self.selection.parts.items():
            mask = torch.zeros(part.shape, dtype=torch.bool)
            part.put(mask, differ(self.before[name], self.after[name]))
            masks[name] = _coarsest(mask)
        return self.restrict(Selection({name: part for name, part in masks.items() if part is not None}))

    def restrict(self, selection: Selection) -> Delta:
        """Return the delta on the entries that are also in a selection; the others stay as in the base."""
        kept = self.selection & selection
        before, after = (
            {name: part.take(self._spread(name, side[name])) for name, part in kept.parts.items()}
            for side in (self.before, self.after)
        )
        return replace(self, selection=kept, before=before, after=after)

    def compose(self, *others: Delta, minus: Sequence[Delta] = ()) -> Delta:
        """Return the sum of the changes, less those of some deltas, on the union of the supports; the order does not matter, to the bit.

        Changes are added in fp64 and rounded once. Where all others add up to nothing the specialist's own value stays, bit for bit.

        Raises:
            UserError: the deltas belong to different bases.
        """
        return _sum([*((1, delta) for delta in (self, *others)), *((-1, delta) for delta in minus)])

    def minus(self, other: Delta) -> Delta:
        """Return the difference of two deltas: this one's changes less the other's, on the union of the supports.

        Raises:
            UserError: the deltas belong to different bases.
        """
        return self.compose(minus=[other])

    def apply(self, base: Base) -> None:
        """Write the specialist's values into its base in place; nothing else is touched.

        Raises:
            UserError: it is another base, or the entries do not hold the base's values.
        """
        self._exchange(base, self.before, self.after, "the entries do not hold the base's values: a delta is on them already")

    def revert(self, base: Base) -> None:
        """Undo :meth:`apply`: the base's values are written back, bit for bit.

        Raises:
            UserError: it is another base, or the entries do not hold this delta's values.
        """
        self._exchange(base, self.after, self.before, "the entries do not hold this delta's values: it is not applied")

    def belongs(self, base: Base) -> None:
        """Check that a base is this delta's.

        Raises:
            UserError: it is not.
        """
        if base.fingerprint != self.fingerprint:
            raise UserError(
                f"the delta belongs to another base than '{base.spec}'", expected=f"'{self.spec}' as it was at training"
            )

    def put(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Write ``before`` or ``after`` into a model, unchecked, in the time of touching these entries."""
        weights = dict(model.named_parameters())
        for name, part in self.selection.parts.items():
            part.put(weights[name].data, values[name])

    def _exchange(self, base: Base, old: Mapping[str, Tensor], new: Mapping[str, Tensor], otherwise: str) -> None:
        self.belongs(base)
        self.check(base.model, old, otherwise)
        self.put(base.model, new)

    def check(self, model: nn.Module, values: Mapping[str, Tensor], otherwise: str) -> None:
        """Check that a model's entries are ``before`` or ``after``, bit for bit (in the model's dtype).

        Raises:
            UserError: they are not, or the model has no such parameter.
        """
        weights = dict(model.named_parameters())
        for name, part in self.selection.parts.items():
            if name not in weights or tuple(weights[name].shape) != part.shape:
                raise UserError(
                    f"the model has no parameter '{name}' of shape {part.shape}", expected=f"a model like '{self.spec}'"
                )
            now = part.take(weights[name].detach()).cpu()
            if differ(now, values[name].to(now.dtype)).any():
                raise UserError(f"{otherwise} ('{name}')", expected=f"a copy of '{self.spec}'")

    def _spread(self, name: str, values: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return a tensor of the parameter's shape with these values, elsewhere a given tensor's, or zero."""
        part = self.selection.parts[name]
        full = torch.zeros(part.shape, dtype=values.dtype) if onto is None else onto.clone()
        part.put(full, values)
        return full

    def __eq__(self, other: object) -> bool:
        """Whether base, support and values are the same, bit for bit, whatever form the parts are kept in."""
        if not isinstance(other, Delta) or self.fingerprint != other.fingerprint or self.selection != other.selection:
            return False
        return not any(
            one[name].dtype != two[name].dtype or differ(self._spread(name, one[name]), other._spread(name, two[name])).any()
            for name in self.selection.names()
            for one, two in ((self.before, other.before), (self.after, other.after))
        )

    __hash__ = None  # type: ignore[assignment]


def origin_in_place(folder: Path, base: Base | None = None) -> dict[str, Any]:
    """Return which base a specialist belongs to, that was trained in place.

    Raises:
        UserError: the folder holds no specialist, one of another base, or an adapter.
    """
    origin = read_origin(folder, base)
    if not (folder / CHANGED).is_file():
        form = origin["form"].get("method", "?")
        raise UserError(f"was not trained in place (its form is {form})", file=folder, expected=f"a folder with {CHANGED}",
                        mend="train with `form: full`, or merge the adapter with `selectune export`")  # fmt: skip
    return origin


def _sum(terms: Sequence[tuple[int, Delta]]) -> Delta:
    """Add and subtract the changes of deltas of one base."""
    first = terms[0][1]
    for _, delta in terms:
        if delta.fingerprint != first.fingerprint:
            raise UserError(
                f"the deltas belong to different bases, '{first.spec}' and '{delta.spec}'", expected="deltas of one base"
            )
    union = reduce(lambda left, right: left | right, (delta.selection for _, delta in terms))
    selection = Selection({name: _tiled(part) for name, part in union.parts.items()})
    pairs = {
        name: _sum_of(name, part, [(sign, delta) for sign, delta in terms if delta.selection.covers(name)])
        for name, part in selection.parts.items()
    }
    before, after = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    return replace(first, selection=selection, before=before, after=after)


def _sum_of(name: str, part: Part, terms: Sequence[tuple[int, Delta]]) -> tuple[Tensor, Tensor]:
    """Return one parameter's values before and after, on the union of the terms' supports."""
    dtype = reduce(torch.promote_types, (delta.after[name].dtype for _, delta in terms))
    original = torch.zeros(part.shape, dtype=dtype)
    for _, delta in terms:
        delta.selection.parts[name].put(original, delta.before[name])
    before = part.take(original)
    afters = [part.take(delta._spread(name, delta.after[name], original)) for _, delta in terms]
    changes = torch.stack([sign * (after.double() - before.double()) for (sign, _), after in zip(terms, afters, strict=True)])
    total = changes.sort(0).values.sum(0)  # sorted: the order of the deltas must not round otherwise
    result = torch.where(total == 0, before, (before.double() + total).to(dtype))
    for (sign, _), after, change in zip(terms, afters, changes, strict=True):
        if sign > 0:
            result = torch.where((change == total) & differ(after, before), after, result)
    return before, result


def _weights(base: Base) -> dict[str, Tensor]:
    """Return a base's parameters.

    Raises:
        ValueError: they are in memory in a dtype that does not hold the values on disk.
    """
    weights: dict[str, Tensor] = dict(base.model.named_parameters())
    for name, value in weights.items():
        if torch.promote_types(value.dtype, base.dtype) != value.dtype:
            raise ValueError(f"'{name}' was rounded from {base.dtype} to {value.dtype}: load the base in its own dtype")
    return weights


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one dtype: the second's where it holds the first exactly, else the wider of the two."""
    if torch.equal(one.to(other.dtype).to(one.dtype), one):
        return one.to(other.dtype), other
    dtype = torch.promote_types(one.dtype, other.dtype)
    return one.to(dtype), other.to(dtype)


def differ(one: Tensor, other: Tensor) -> Tensor:
    """Return where the bits of two tensors of one dtype differ: zeros of two signs do, and equal NaNs do not."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.contiguous().view(bits) != other.contiguous().view(bits)


def _tiled(part: Part) -> Part:
    """Return a part whose entries can be taken: blocks that do not fill their tensor as single elements."""
    return part.flat() if part.form == "blocks" and not part.tiles() else part


def _coarsest(mask: Tensor) -> Part | None:
    """Return a mask in the coarsest form that says it exactly, None when it is empty."""
    if not mask.any():
        return None
    mask = mask.cpu()
    shape = tuple(mask.shape)
    if mask.all():
        return Part(shape)
    if mask.dim() > 1 and torch.equal(mask.flatten(1).any(1), mask.flatten(1).all(1)):
        return Part(shape, "rows", mask.flatten(1).any(1).nonzero().squeeze(-1))
    if mask.dim() == 2 and torch.equal(mask.any(0), mask.all(0)):
        return Part(shape, "columns", mask.any(0).nonzero().squeeze(-1))
    return Part(shape, "elements", mask.view(-1).nonzero().squeeze(-1))
