"""The weights that play a role, exactly: of a fused matrix only the part that plays it.

Knows: which rows of a fused query-key-value or gate-up matrix belong to which role, and the biases that belong to matrices. Does not
know: why a role was chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selectune.models.anatomy import Block
from selectune.parameters.factors.targets import Target, in_order, targets
from selectune.parameters.selection import Part, Selection

if TYPE_CHECKING:
    from selectune.models import Base

_FUSED = {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}
_NAMES = {"attention": {"query", "key", "value", "attention_output"}, "mlp": {"gate", "up", "down"}}


def weights_by_role(base: Base, which: str, *, biases: bool = True, blocks: Iterable[int] | None = None) -> Selection:
    """Return the weights of some roles, in some blocks (all).

    Args:
        which: ``linear``, ``attention``, ``mlp``, or roles joined by ``+``. biases: with the biases of these matrices.

    Raises:
        UserError: an unknown role, one that this base has not, or a part of a fused matrix whose rows are mixed.
    """
    asked = {role for part in which.split("+") for role in _plain(part.strip())}
    inside = set(range(len(base.anatomy.blocks))) if blocks is None else set(blocks)
    shapes = {name: tuple(value.shape) for name, value in base.model.named_parameters()}
    parts: dict[str, Part] = {}
    for target in targets(base, which):
        if target.block not in inside:
            continue
        lines = _lines(target, base.anatomy.blocks[target.block], asked)
        parts[target.name] = _part(target, lines)
        bias = target.name.removesuffix("weight") + "bias"
        if biases and target.name.endswith(".weight") and bias in shapes:
            parts[bias] = Part(shapes[bias]) if lines is None else Part(shapes[bias], "elements", lines)
    return Selection(dict(sorted(parts.items())))


def _plain(name: str) -> set[str]:
    """The unfused roles that a name of :func:`targets` stands for."""
    if name == "linear":
        return _NAMES["attention"] | _NAMES["mlp"]
    return _NAMES.get(name) or set(_FUSED.get(name, (name,)))


def _lines(target: Target, block: Block, asked: set[str]) -> Tensor | None:
    """Which outputs of a fused matrix play the asked roles, ``(n,)`` int64; None: all of it does."""
    roles = _FUSED.get(target.role, (target.role,))
    if set(roles) <= asked:
        return None
    in_order(target, block)
    keys = block.key_value_heads * block.head_size
    sizes = [block.heads * block.head_size, keys, keys] if target.role == "query_key_value" else [block.channels] * 2
    ends = torch.tensor(sizes).cumsum(0).tolist()
    found = [torch.arange(end - size, end) for role, size, end in zip(roles, sizes, ends, strict=True) if role in asked]
    return torch.cat(found)


def _part(target: Target, lines: Tensor | None) -> Part:
    if lines is None:
        return Part(target.shape)
    if len(target.shape) == 2:
        return Part(target.shape, "columns" if target.transposed else "rows", lines)
    mask = torch.zeros(target.shape, dtype=torch.bool)  # a stack of experts
    mask[:, lines] = True
    return Part(target.shape, "elements", mask.view(-1).nonzero().squeeze(-1))
