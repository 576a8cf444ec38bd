"""Granularities: what is chosen as one.

Knows: how a base's weights fall into single entries, rows (one output neuron's weights), columns (one input's), square blocks, heads, channels
of the MLP, whole matrices, whole blocks and experts; what a unit scores, how many entries it has, and the parts that it is made of.
Does not know: where scores come from, or which units are chosen.

A head is its rows of query (and, where every query head of its group is chosen together, of key and value) and its columns of the output
projection; a channel is its row of gate and up and its column of down.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from selectune.errors import UserError
from selectune.models.anatomy import Block
from selectune.parameters.factors.targets import Target, in_order
from selectune.parameters.selection import Part, Selection

Granularity = Literal["element", "row", "column", "square", "head", "channel", "matrix", "block", "expert"]
Reduction = Literal["mean", "absolute_mean", "sum", "norm"]


@dataclass(frozen=True)
class Slice:
    """Where a kind of unit lies in one weight: unit ``i`` is its rows (axis 0) or columns (axis 1) ``offset + i*width`` to ``+ width``."""

    target: Target
    axis: int
    width: int
    offset: int = 0

    def view(self, scores: Tensor, count: int) -> Tensor:
        """Return a weight's scores as ``(units, entries of the unit)``."""
        span = scores.narrow(self.axis, self.offset, count * self.width)
        return (span if self.axis == 0 else span.transpose(0, 1)).reshape(count, -1)

    def part(self, index: Tensor) -> Part:
        """Return the part that some units are of this weight."""
        lines = (self.offset + index[:, None] * self.width + torch.arange(self.width, device=index.device)).view(-1)
        return Part(self.target.shape, "rows" if self.axis == 0 else "columns", lines)


@dataclass(frozen=True)
class Units:
    """Like units: all entries of a matrix, all heads of a block, ..."""

    scores: Tensor
    """``(units,)`` fp32."""
    size: int
    """Entries in each unit."""
    block: int
    parts: Callable[[Tensor], dict[str, Part]] = field(repr=False)
    """From the numbers of chosen units, ``(n,)`` int64, to parts of weights."""
    label: str = ""
    row: int = 1
    """Entries of one output neuron, for entries in rows one after the other."""


def _reduced(entries: Tensor, how: Reduction) -> Tensor:
    if how == "absolute_mean":
        return entries.mean(-1).abs()
    return entries.mean(-1) if how == "mean" else entries.sum(-1) if how == "sum" else entries.norm(dim=-1)


def units(
    granularity: Granularity,
    targets: Sequence[Target],
    scores: dict[str, Tensor],
    blocks: Sequence[Block],
    *,
    side: int = 64,
    reduce: Reduction = "mean",
) -> list[Units]:
    """Return the units of some weights with their scores.

    Args:
        scores: name -> scores of the entries. side: of square blocks. reduce: a unit's score from those of its entries.

    Raises:
        UserError: a side that does not divide the matrices, or weights that have no such units.
    """
    if granularity == "element":
        return [_entries(target, scores[target.name]) for target in targets]
    if granularity in ("row", "column", "square") and all(len(target.shape) != 2 for target in targets):
        raise UserError(f"these weights have no {granularity}s: none of them is a matrix", field="parameters.granularity",
                        expected="element, matrix or expert, or other `targets`")  # fmt: skip
    if granularity in ("row", "column"):
        return [_lines(target, scores[target.name], granularity, reduce) for target in targets if len(target.shape) == 2]
    if granularity == "square":
        return [_squares(target, scores[target.name], side, reduce) for target in targets if len(target.shape) == 2]
    if granularity == "matrix":
        return [_joined([Slice(target, 0, target.shape[0])], scores, 1, reduce, target.name) for target in targets]
    found = []
    by_block: dict[int, list[Target]] = defaultdict(list)
    for target in targets:
        by_block[target.block].append(target)
    for index, inside in sorted(by_block.items()):
        if granularity == "block":
            found.append(_joined([Slice(t, 0, t.shape[0]) for t in inside], scores, 1, reduce, f"block {index}"))
            continue
        count, slices = unit_slices(granularity, blocks[index], inside)
        if slices:
            found.append(_joined(slices, scores, count, reduce, f"{granularity}s of block {index}"))
    if not found:
        raise UserError(f"these weights have no {granularity}s", field="parameters.granularity")
    return found


def unit_slices(granularity: Granularity, block: Block, targets: Sequence[Target]) -> tuple[int, list[Slice]]:
    """Return how many heads, channels or experts a block has, and where they lie in its weights.

    With grouped queries a ``head`` is a query head when only query and output weights are given, and a group (its key and value, and all
    the query heads that share them) when key or value are among the weights.
    """
    if granularity == "expert":
        return block.experts, [Slice(t, 0, 1) for t in targets if len(t.shape) == 3]
    flat = [target for target in targets if len(target.shape) == 2]
    out = {target.name: 1 if target.transposed else 0 for target in flat}
    if granularity == "channel":
        slices = []
        for t in flat:  # an expert that all share may be wider, and its channels are others
            if t.role in ("gate", "up") and t.shape[out[t.name]] == block.channels:
                slices.append(Slice(t, out[t.name], 1))
            elif t.role == "gate_up" and t.shape[out[t.name]] == 2 * block.channels:
                slices += [Slice(t, out[t.name], 1), Slice(t, out[t.name], 1, block.channels)]
            elif t.role == "down" and t.shape[1 - out[t.name]] == block.channels:
                slices.append(Slice(t, 1 - out[t.name], 1))
        return block.channels, slices
    grouped = any(target.role in ("key", "value", "query_key_value") for target in flat)
    count = block.key_value_heads if grouped else block.heads
    width = block.head_size * block.heads // count
    slices = []
    for t in flat:
        in_order(t, block)
        if t.role == "query":
            slices.append(Slice(t, out[t.name], width))
        elif t.role in ("key", "value"):
            slices.append(Slice(t, out[t.name], block.head_size))
        elif t.role == "attention_output":
            slices.append(Slice(t, 1 - out[t.name], width))
        elif t.role == "query_key_value":
            queries, keys = block.heads * block.head_size, block.key_value_heads * block.head_size
            slices += [Slice(t, out[t.name], width), Slice(t, out[t.name], block.head_size, queries),
                       Slice(t, out[t.name], block.head_size, queries + keys)]  # fmt: skip
    return count, slices


def _joined(slices: list[Slice], scores: dict[str, Tensor], count: int, how: Reduction, label: str) -> Units:
    views = [piece.view(scores[piece.target.name], count) for piece in slices]
    entries = torch.cat(views, dim=1)

    def parts(index: Tensor) -> dict[str, Part]:
        made: dict[str, Part] = {}
        for piece in slices:
            whole = len(index) == count and piece.offset == 0 and count * piece.width == piece.target.shape[piece.axis]
            part = Part(piece.target.shape) if whole else piece.part(index)
            if piece.target.name in made:
                merged = Selection({piece.target.name: made[piece.target.name]}) | Selection({piece.target.name: part})
                part = merged.parts[piece.target.name]
            made[piece.target.name] = part
        return made

    return Units(_reduced(entries, how), entries.shape[1], slices[0].target.block, parts, label)


def _entries(target: Target, scores: Tensor) -> Units:
    shape = target.shape
    turned = scores.transpose(-1, -2) if target.transposed else scores
    across = turned.shape[-1]

    def parts(index: Tensor) -> dict[str, Part]:
        if target.transposed:
            index = (index % across) * shape[1] + index // across
        return {target.name: Part(shape, "elements", index)}

    return Units(turned.reshape(-1), 1, target.block, parts, target.name, row=across)


def _lines(target: Target, scores: Tensor, kind: str, how: Reduction) -> Units:
    axis = int((kind == "column") != target.transposed)
    return _joined([Slice(target, axis, 1)], {target.name: scores}, target.shape[axis], how, target.name)


def _squares(target: Target, scores: Tensor, side: int, how: Reduction) -> Units:
    down, across = target.shape
    if down % side or across % side:
        raise UserError(f"blocks of {side} do not fill '{target.name}' of {down} by {across}", field="parameters.side",
                        expected="a side that divides every matrix in `targets`, such as 64 or 32")  # fmt: skip
    tiles = scores.view(down // side, side, across // side, side).permute(0, 2, 1, 3).reshape(-1, side * side)

    def parts(index: Tensor) -> dict[str, Part]:
        return {target.name: Part(target.shape, "blocks", index, side)}

    return Units(_reduced(tiles, how), side * side, target.block, parts, target.name)


def gathered(chosen: Sequence[tuple[Units, Tensor]]) -> Selection:
    """Return chosen units as a selection."""
    parts: dict[str, Part] = {}
    for group, index in chosen:
        if len(index):
            parts |= group.parts(index)
    return Selection(dict(sorted(parts.items())))
