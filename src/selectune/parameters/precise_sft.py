"""Precise fine-tuning: only the heads (and MLPs) train that carry the answer, found by path patching.

A head counts when the answer's probability falls once the head's output at the last position is that of a prompt without the skill, all other
heads held. The heads that lower it most train: their rows of query, key and value, their columns of the output projection.
Knows: which effects are taken, and what belongs to a head. Does not know: how effects are measured (``factors/patching.py``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.parameters.factors.allocation import best
from selectune.parameters.factors.patching import Pair, effects, made_pairs, mlp_of, read_pairs
from selectune.parameters.factors.targets import Target, in_order, targets
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Part, Selection


class PreciseSFT(ParameterMethod):
    """The heads and MLPs that an answer depends on."""

    name: ClassVar[str] = "precise_sft"
    family: ClassVar[str] = "heads-neurons-channels"
    paper: ClassVar[str] = (
        "Interpreting and Improving Large Language Models in Arithmetic Calculation, ICML 2024, arXiv 2409.01659"
    )
    summary: ClassVar[str] = "The k heads (and MLPs) without which, by path patching, the answers become least likely."
    departs: ClassVar[str] = (
        "The gradients of a block with h of H heads are not multiplied by H/h: AdamW is indifferent to it, and the engine has one learning rate. "
        "Without a file of pairs, the counterfactual of a record's prompt is that of another record, cut to its length. The released code was "
        "not found; the threshold on effects is replaced by k."
    )

    k: Annotated[int, Field(gt=0)] = 16
    """Heads that train."""
    mlps: Annotated[int, Field(ge=0)] = 0
    """MLPs that train beside them."""
    key_value: Literal["any", "frozen"] = "any"
    """With grouped queries: a group's key and value train when any of its query heads does, or never."""
    examples: Annotated[int, Field(gt=0)] = 64
    """Training records to make pairs of, the first by hash of their content."""
    pairs: str = ""
    """A file of pairs, JSON lines with ``reference``, ``counterfactual`` and ``answer``, instead."""

    def select(self, context: Context) -> Selection:
        base = context.base
        blocks = base.anatomy.blocks
        there = sum(block.heads for block in blocks)
        if self.k > there or self.mlps > len(blocks):
            raise UserError(f"{self.k} heads and {self.mlps} MLPs are asked for; the base has {there} and {len(blocks)}",
                            field="parameters.k")  # fmt: skip
        heads, mlps = self.found(context)
        context.block_scores.update({block.index: float(-heads[block.index].sum()) for block in blocks})
        parts: dict[str, Part] = {}
        for block, chosen in key_heads(heads, [b.heads for b in blocks], self.k).items():
            for target in targets(base, "attention"):
                lines = _lines(target, base, chosen, self.key_value == "any") if target.block == block else []
                if lines:
                    columns = (target.role == "attention_output") != target.transposed
                    parts[target.name] = Part(target.shape, "columns" if columns else "rows", torch.tensor(lines))
        for number in best(-mlps, self.mlps).tolist():
            prefix = mlp_of(base.model, blocks[number])
            parts |= Selection.of(base.model, [name for name in blocks[number].parameters if name.startswith(prefix)]).parts
        return Selection(dict(sorted(parts.items())))

    def found(self, context: Context) -> tuple[Tensor, Tensor]:
        """Return the effects of all heads and MLPs; see :func:`effects`."""
        pairs: list[Pair] = read_pairs(context, self.pairs) if self.pairs else made_pairs(context, self.examples)
        if not pairs:
            raise UserError("no pairs of prompts can be made of these records", field="parameters.pairs",
                            expected="at least two records with different prompts, or a file of pairs")  # fmt: skip
        context.examples_scored = len(pairs)
        return effects(context, pairs)


def key_heads(heads: Tensor, counts: list[int], k: int) -> dict[int, list[int]]:
    """Return, block -> heads, the k heads of the most negative effect; ties by place.

    Args:
        heads: ``(blocks, most heads)``. counts: heads of each block.
    """
    places = [(block, head) for block, count in enumerate(counts) for head in range(count)]
    flat = torch.stack([heads[block, head] for block, head in places])
    found: dict[int, list[int]] = {}
    for place in best(-flat, k).tolist():
        found.setdefault(places[place][0], []).append(places[place][1])
    return found


def _lines(target: Target, base: object, heads: list[int], key_value: bool) -> list[int]:
    """Return the rows (columns, of the output) of a matrix that belong to some heads of its block."""
    block = base.anatomy.blocks[target.block]  # type: ignore[attr-defined]
    in_order(target, block)
    size, share = block.head_size, block.heads // block.key_value_heads

    def span(offset: int, units: list[int]) -> list[int]:
        return [offset + unit * size + place for unit in units for place in range(size)]

    groups = sorted({head // share for head in heads}) if key_value else []
    if target.role in ("query", "attention_output"):
        return span(0, heads)
    if target.role in ("key", "value"):
        return span(0, groups)
    queries, keys = block.heads * size, block.key_value_heads * size
    return span(0, heads) + span(queries, groups) + span(queries + keys, groups)
