"""Path patching: which heads and MLPs carry an answer from the prompt to the logits.

Knows: pairs of prompts of equal length, one where a skill is needed and one where it is not; the effect on the answer's probability when one
head's or MLP's output at the last position is that of the other prompt, every other head stays as it was, and MLPs compute anew; how heads are
knocked out. Does not know: what is done with an effect.

With every head held, nothing before the last position changes. So one token is computed for each head instead of a whole prompt, all heads of
all blocks in one batch; what its own attention would see is replaced, and does not matter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from selectune.data.records import Message
from selectune.errors import UserError
from selectune.models.anatomy import Anatomy, Block
from selectune.models.head import SplitModel
from selectune.parameters.factors.gradients import first
from selectune.parameters.factors.trial import in_bfloat16

if TYPE_CHECKING:
    from selectune.parameters.method import Context


@dataclass(frozen=True)
class Pair:
    """A prompt that needs a skill, its counterfactual of equal length, and the first token of the answer."""

    reference: tuple[int, ...]
    counterfactual: tuple[int, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(self.reference) != len(self.counterfactual) or self.reference[-1:] != self.counterfactual[-1:]:
            raise UserError(f"a pair's prompts have {len(self.reference)} and {len(self.counterfactual)} tokens", field="parameters.pairs",
                            expected="as many in both, and the same last one")  # fmt: skip


def made_pairs(context: Context, examples: int) -> list[Pair]:
    """Return pairs made of the training records: the counterfactual asks something else, in as many tokens.

    What two prompts have in common at both ends (the template's tokens) stays; what lies between is the next record's, repeated or cut to the
    length of the record's own.
    """
    prompts = []
    for record in first(context.train, examples):
        piece = next(iter(context.encoder.encode(record)), None)
        if piece is None:  # nothing of its response fits
            continue
        start = next((place for place, label in enumerate(piece.labels) if label != -100), 0)
        start = start if start > 1 else len(piece.input_ids) // 2  # a plain text has no prompt; its first half is one
        if 1 < start < len(piece.input_ids):
            prompts.append((tuple(piece.input_ids[:start]), piece.input_ids[start]))
    pairs = []
    for place, (own, answer) in enumerate(prompts):
        instead = (_instead(own, other) for other, _ in prompts[place + 1 :] + prompts[:place])
        pairs += [Pair(own, found, answer) for found in [next((one for one in instead if one not in (None, own)), None)] if found]
    return pairs


def _instead(own: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return a prompt with another one's middle, as long as it was; None where one begins the other and there is no middle."""
    shortest = min(len(own), len(other))
    before = next((i for i in range(shortest) if own[i] != other[i]), shortest)
    after = next((i for i in range(shortest - before) if own[-1 - i] != other[-1 - i]), shortest - before)
    after = max(after, 1)
    if before + after > len(own):
        return None
    middle, wanted = other[before : len(other) - after], len(own) - before - after
    repeated = (middle * (wanted // len(middle) + 1))[:wanted] if middle and wanted > 0 else own[before : len(own) - after]
    return own[:before] + repeated + own[len(own) - after :]


def read_pairs(context: Context, path: str) -> list[Pair]:
    """Read pairs from JSON lines with ``reference``, ``counterfactual`` (what a user asks) and ``answer``.

    Raises:
        UserError: a line is not of that form, or its prompts have different lengths.
    """
    pairs = []
    file = Path(path)
    if not file.is_file():
        raise UserError("no such file of pairs", file=file, field="parameters.pairs")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError("cannot be read as text in UTF-8", file=file, field="parameters.pairs") from None
    for number, line in enumerate(lines, 1):
        try:
            one = json.loads(line)
            asked, instead = (
                tuple(context.encoder.prompt_ids((Message("user", one[key]),))) for key in ("reference", "counterfactual")
            )
            answer = context.base.tokenizer(one["answer"], add_special_tokens=False)["input_ids"][0]
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(f"line {number} is no pair", file=file, field="parameters.pairs",
                            expected='{"reference": "...", "counterfactual": "...", "answer": "..."}') from None  # fmt: skip
        if len(asked) != len(instead) or asked[-1] != instead[-1]:
            raise UserError(f"the prompts have {len(asked)} and {len(instead)} tokens", file=file, line=number, field="parameters.pairs",
                            expected="as many in both, and the same last one")  # fmt: skip
        pairs.append(Pair(asked, instead, answer))
    return pairs


def output_of(block: Block) -> str:
    """Return the name of the layer whose input is the outputs of a block's heads, one after the other.

    Raises:
        UserError: the block has none that is known.
    """
    return _layer(block, "attention_output")


def mlp_of(model: nn.Module, block: Block) -> str:
    """Return the name of a block's MLP (of its mixture of experts)."""
    if block.experts:
        return block.expert_parameters[0].rpartition(".")[0].rpartition(".")[0]
    name = _layer(block, "down").rpartition(".")[0]
    if name == block.prefix:
        raise UserError(
            f"the MLP of block {block.index} is no module of its own", field="parameters", expected="another choice of weights"
        )
    return name


def _layer(block: Block, role: str) -> str:
    found = next((name for name, own in block.linears.items() if own == role), None)
    if found is None:
        raise UserError(
            f"block {block.index} of this base has no layer of the kind '{role}'",
            field="parameters",
            expected="another choice of weights",
        )
    return found


@dataclass
class _Seen:
    """What a pass over a prompt computes at the last position."""

    heads: list[Tensor]
    """For each block ``(heads * head_size,)``."""
    mlps: list[Tensor]
    """For each block ``(hidden,)``."""
    probability: float


@torch.no_grad()
def effects(context: Context, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Return the mean relative change of the answer's probability when a head, or an MLP, is patched.

    Returns:
        ``(blocks, most heads)`` and ``(blocks,)`` fp32; negative where the answer depends on it. Heads that a block has not are zero.
    """
    model, blocks = context.base.model, context.base.anatomy.blocks
    split = SplitModel(model)
    heads = torch.zeros(len(blocks), max(block.heads for block in blocks), dtype=torch.float64)
    mlps = torch.zeros(len(blocks), dtype=torch.float64)
    for pair in pairs:
        own, other = (_look(context, split, prompt, pair.answer) for prompt in (pair.reference, pair.counterfactual))
        variants = [(b, h) for b, block in enumerate(blocks) for h in range(block.heads)] + [
            (b, None) for b in range(len(blocks))
        ]
        patched = _patched(context, split, pair, own, other, [(variant,) for variant in variants])
        context.meter.count(forward=len(pair.reference) * 2 + len(variants))
        for (block, head), probability in zip(variants, patched.tolist(), strict=True):
            change = (probability - own.probability) / max(own.probability, 1e-30) / len(pairs)
            if head is None:
                mlps[block] += change
            else:
                heads[block, head] += change
    return heads.float(), mlps.float()


def _look(context: Context, split: SplitModel, prompt: Sequence[int], answer: int) -> _Seen:
    blocks, seen = context.base.anatomy.blocks, _Seen([], [], 0.0)
    with ExitStack() as stack:
        for block in blocks:
            layer, mlp = (split.causal.get_submodule(name) for name in (output_of(block), mlp_of(split.causal, block)))
            stack.callback(layer.register_forward_pre_hook(lambda _, inputs: seen.heads.append(inputs[0][0, -1].clone())).remove)
            stack.callback(
                mlp.register_forward_hook(lambda _, __, output: seen.mlps.append(output.reshape(-1, output.shape[-1])[-1])).remove
            )
        seen.probability = float(_probability(context, split, torch.tensor([list(prompt)]), None, answer))
    return seen


def _patched(
    context: Context,
    split: SplitModel,
    pair: Pair,
    own: _Seen,
    other: _Seen,
    variants: Sequence[Sequence[tuple[int, int | None]]],
) -> Tensor:
    """Return the answer's probability in each variant, ``(variants,)``: its heads, and MLPs (head None), are the other prompt's."""
    with ExitStack() as stack:
        for number, block in enumerate(context.base.anatomy.blocks):
            held = own.heads[number].repeat(len(variants), 1).view(len(variants), block.heads, -1)
            theirs = other.heads[number].view(block.heads, -1)
            rows = []
            for row, variant in enumerate(variants):
                for there, head in variant:
                    if there == number and head is not None:
                        held[row, head] = theirs[head]
                    elif there == number:
                        rows.append(row)
            held = held.view(len(variants), 1, -1)
            layer = split.causal.get_submodule(output_of(block))
            stack.callback(
                layer.register_forward_pre_hook(lambda _, inputs, held=held: (held.to(inputs[0].dtype), *inputs[1:])).remove
            )
            if rows:
                mlp = split.causal.get_submodule(mlp_of(split.causal, block))
                stack.callback(mlp.register_forward_hook(_replaced(rows, other.mlps[number])).remove)
        tokens = torch.full((len(variants), 1), pair.reference[-1])
        return _probability(context, split, tokens, torch.full_like(tokens, len(pair.reference) - 1), pair.answer)


def _replaced(rows: list[int], value: Tensor) -> Any:
    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed.view(-1, output.shape[-1])[rows] = value.to(output.dtype)
        return changed

    return hook


def _probability(context: Context, split: SplitModel, tokens: Tensor, positions: Tensor | None, answer: int) -> Tensor:
    inputs = {} if positions is None else {"position_ids": positions}
    device = next(split.causal.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(context)):
        hidden = split.hidden(input_ids=tokens.to(device), **{key: value.to(device) for key, value in inputs.items()})
        return split.logits(hidden[:, -1]).float().softmax(-1)[:, answer].cpu()


@contextmanager
def without_heads(model: Any, anatomy: Anatomy, heads: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Within, some heads (block -> heads) give the mean of their outputs over the tokens of each pass, whatever the token."""
    with ExitStack() as stack:
        for block in anatomy.blocks:
            if heads.get(block.index):
                layer = model.get_submodule(output_of(block))
                stack.callback(layer.register_forward_pre_hook(_mean(block.heads, list(heads[block.index]))).remove)
        yield


def _mean(count: int, heads: list[int]) -> Any:
    def hook(layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states = inputs[0].unflatten(-1, (count, -1)).clone()
        states[..., heads, :] = states[..., heads, :].mean(dim=(0, 1), keepdim=True)
        return states.flatten(-2), *inputs[1:]

    return hook
