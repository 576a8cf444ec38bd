"""S2FT: some heads and channels of the MLP train, wherever in the model they lie, as rows of what leads in and columns of what leads out.

A channel's row of the up projection and its column of the down projection, a head's rows of the value and its columns of the output projection,
are drawn from all blocks together, for each of the four by itself. The paper then permutes channels so that what trains is one contiguous slice;
rows and columns train at the cost of the part here wherever they lie, so nothing is permuted.

With grouped queries the value's heads are the groups, and the output's the query heads.

Knows: the four kinds of units and the seven ways of ranking them. Does not know: how rows and columns train.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.models.anatomy import Block
from selectune.parameters.factors.allocation import best
from selectune.parameters.factors.gradients import first, gather
from selectune.parameters.factors.inputs import input_moments
from selectune.parameters.factors.targets import Target, in_order, targets
from selectune.parameters.factors.units import Slice
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection

_KINDS = ("value", "output", "up", "down")


class S2FT(ParameterMethod):
    """Heads and channels of all blocks together, as rows and columns of weights."""

    name: ClassVar[str] = "s2ft"
    family: ClassVar[str] = "heads-neurons-channels"
    paper: ClassVar[str] = (
        "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity, NeurIPS 2024, arXiv 2412.06289"
    )
    summary: ClassVar[str] = "Some heads and channels, wherever they lie: rows of value and up, columns of output and down."
    departs: ClassVar[str] = (
        "Nothing is permuted: rows and columns train at the cost of the part wherever they lie. With grouped queries a value head is the "
        "whole group (the released code permutes groups by the numbers of query heads)."
    )
    usual_rate: ClassVar[float | None] = 1e-3

    down: Annotated[float, Field(ge=0, le=1)] = 0.04
    """Share of all channels whose column of the down projection trains."""
    up: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of all channels whose row of the up projection trains."""
    output: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of all query heads whose columns of the output projection train."""
    value: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of all value heads whose rows of the value projection train."""
    rank_by: Literal["random", "weight", "activation", "weight_activation", "gradient"] = "random"
    """By what units are chosen: at random, the norm of the weights, of what the unit puts out, the product of the two, or the norm of the
    gradient."""
    smallest: bool = False
    """Choose the smallest instead of the largest."""
    examples: Annotated[int, Field(gt=0)] = 64
    """Training records to see activations or gradients on, the first by hash of their content."""

    def select(self, context: Context) -> Selection:
        asked = {kind: getattr(self, kind) for kind in _KINDS if getattr(self, kind) > 0}
        if not asked:
            raise UserError("no heads and no channels are asked for", field="parameters.down", expected="a share above 0")
        found = Selection({})
        for kind, share in asked.items():
            found |= self._choose(context, kind, share)
        return found

    def _choose(self, context: Context, kind: str, share: float) -> Selection:
        blocks = context.base.anatomy.blocks
        role = {"output": "attention_output"}.get(kind, kind)
        slices = [
            _slice(target, kind, blocks[target.block])
            for target in targets(context.base, role)
            if _has_units(target, kind, blocks[target.block])
        ]
        if not slices:
            raise UserError(f"this base has no dense {kind} projection", field=f"parameters.{kind}", expected="0")
        counts = [_count(kind, blocks[piece.target.block]) for piece in slices]
        scores = torch.cat(self._rank(context, kind, slices, counts))
        wanted = int(share * len(scores))
        if not wanted:
            raise UserError(f"{share:g} of {len(scores)} {kind} units is less than one", field=f"parameters.{kind}",
                            expected=f"at least {1 / len(scores):.2g}")  # fmt: skip
        chosen = best(-scores if self.smallest else scores, wanted)
        parts, start = {}, 0
        for piece, count in zip(slices, counts, strict=True):
            index = chosen[(chosen >= start) & (chosen < start + count)] - start
            if len(index):
                parts[piece.target.name] = piece.part(index)
            start += count
        return Selection(dict(sorted(parts.items())))

    def _rank(self, context: Context, kind: str, slices: list[Slice], counts: list[int]) -> list[Tensor]:
        """Return the units' scores, ``(units,)`` for each slice."""
        if self.rank_by == "random":
            return [torch.rand(count, generator=context.generator) for count in counts]
        names = [piece.target.name for piece in slices]
        if self.rank_by == "gradient":
            entries = gather(context, names, ["mean"], examples=self.examples)["mean"]
        else:
            weights = dict(context.base.model.named_parameters())
            entries = {name: weights[name].detach().float() for name in names}
        norms = [piece.view(entries[name], count).norm(dim=1) for piece, name, count in zip(slices, names, counts, strict=True)]
        if self.rank_by in ("weight", "gradient"):
            return norms
        sizes = self._activations(context, kind, slices, counts)
        return sizes if self.rank_by == "activation" else [norm * size for norm, size in zip(norms, sizes, strict=True)]

    def _activations(self, context: Context, kind: str, slices: list[Slice], counts: list[int]) -> list[Tensor]:
        """Return the root mean square of what each unit hands to the projection that leads out of it."""
        following = "down" if kind in ("up", "down") else "attention_output"
        blocks = context.base.anatomy.blocks
        leading = {t.block: t for t in targets(context.base, following) if _has_units(t, following, blocks[t.block])}
        moments = input_moments(context, list(leading.values()), first(context.train, self.examples))
        return [
            moments[leading[piece.target.block].name].view(count, -1).mean(1).sqrt()
            for piece, count in zip(slices, counts, strict=True)
        ]


def _count(kind: str, block: Block) -> int:
    return {"value": block.key_value_heads, "output": block.heads}.get(kind, block.channels)


def _has_units(target: Target, kind: str, block: Block) -> bool:
    """Whether a matrix is cut into the block's units; an expert that all share may be wider, and its channels are others."""
    if len(target.shape) != 2:
        return False
    inputs, outputs = (0, 1) if target.transposed else (1, 0)
    if kind in ("up", "down"):
        fused = 2 if kind == "up" and target.role == "gate_up" else 1
        return target.shape[inputs if kind == "down" else outputs] == fused * block.channels
    in_order(target, block)
    return True


def _slice(target: Target, kind: str, block: Block) -> Slice:
    """Return where a kind of unit lies in a weight, also where several are fused into one."""
    inputs, outputs = (0, 1) if target.transposed else (1, 0)
    if kind == "down":
        return Slice(target, inputs, 1)
    if kind == "output":
        return Slice(target, inputs, block.head_size)
    if kind == "up":
        return Slice(target, outputs, 1, block.channels if target.role == "gate_up" else 0)
    before = (block.heads + block.key_value_heads) * block.head_size if target.role == "query_key_value" else 0
    return Slice(target, outputs, block.head_size, before)
