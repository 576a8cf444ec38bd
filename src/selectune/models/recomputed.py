"""What is cheap to compute again is not kept for the backward pass.

Knows: which tensors of a forward pass have a recipe (a norm's output, a gated unit's product), and how a saved one is replaced by its
recipe whoever saves it: a linear layer, an adapter, a part of a weight. Several layers that saved the same tensor have it made once.
Does not know: what the recipes compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Recipe = Callable[[], Tensor]

_recipes: dict[int, tuple[StorageWeakRef, Recipe]] | None = None
"""By a storage's identity, while a forward pass lasts; the weak reference keeps the identity from being given to another storage."""
_last: list[tuple[Recipe, Tensor]] = []
"""The tensor that was made last: its other users come next on the way back."""


def recomputed_by(found: Tensor, recipe: Recipe) -> Tensor:
    """Say how a contiguous tensor can be had again, and return it.

    One that needs no gradient itself is kept as it is: then nobody keeps what it is made of.

    Args:
        recipe: makes it anew, without gradient, from tensors that are kept anyway; it must hold none that has a gradient.
    """
    if _recipes is not None and found.requires_grad and torch.is_grad_enabled():
        storage = found.untyped_storage()
        _recipes[storage._cdata] = StorageWeakRef(storage), recipe
    return found


def is_recomputed(value: Tensor) -> bool:
    """Whether a tensor, if it is saved now, takes no memory."""
    return _recipes is not None and value.untyped_storage()._cdata in _recipes


@contextmanager
def recomputing(note: Callable[[Tensor], None] = lambda kept: None) -> Iterator[None]:
    """Within, tensors that can be had again are not kept for the backward pass; the backward pass may come later.

    Args:
        note: is told of each tensor that is kept.
    """
    global _recipes

    def pack(value: Tensor) -> Any:
        if value.is_sparse:  # it has no storage of its own, and no recipe
            note(value._indices())
            note(value._values())
            return value.detach()
        known = _recipes.get(value.untyped_storage()._cdata) if _recipes else None
        if known is not None:
            return known[1], value.size(), value.stride(), value.storage_offset()
        note(value)
        return value.detach()  # the tensor itself would keep its own graph alive

    before, _recipes = _recipes, {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            yield
    finally:
        _recipes = before
        _last.clear()


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    recipe, *place = kept
    if not _last or _last[0][0] is not recipe:
        with torch.no_grad():
            _last[:] = [(recipe, recipe())]
    return _last[0][1].as_strided(*place)
