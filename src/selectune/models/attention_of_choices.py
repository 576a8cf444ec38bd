"""Attention of questions laid end to end in one row on a CPU: no padding, and no mask over what cannot be seen anyway.

Knows: a row in which every question is a context and continuations that are blind to one another, all questions behind one
shared beginning whose keys and values were kept; how transformers is told to attend this way. The sums are those of a dense mask.
Does not know: what is asked, and backward passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "selectune_of_choices"

BLOCK = 256
"""Queries whose scores are made at once: keys after them are never met."""

KeysAndValues = dict[int, tuple[Tensor, Tensor]]
"""By layer: keys and values, each ``(key heads, tokens, size)``."""


@dataclass(frozen=True)
class Block:
    """Queries ``start`` to ``stop`` of a question that begins at ``begin``; ``added`` goes to the scores of keys from ``first`` on."""

    begin: int
    start: int
    stop: int
    first: int
    added: Tensor


@dataclass
class Row:
    """What attention must know of one row of questions.

    Args:
        parts: for each question the lengths of its context and of its continuations, in the order of the row.
        prefix: keys and values of the shared beginning. keep: keep the keys and values of this row, in ``kept``.
    """

    parts: Sequence[Sequence[int]]
    prefix: KeysAndValues = field(default_factory=dict)
    keep: bool = False

    def __post_init__(self) -> None:
        self.kept: KeysAndValues = {}
        self.blocks = [block for begin, lengths in _begins(self.parts) for block in _blocks(begin, lengths)]


def _begins(parts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Sequence[int]]]:
    begin = 0
    for lengths in parts:
        yield begin, lengths
        begin += sum(lengths)


def _blocks(begin: int, lengths: Sequence[int]) -> Iterator[Block]:
    """Cut a question into blocks of queries. What a query may not see: later tokens, and other continuations."""
    part = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))  # 0: context, 1..: continuations
    for start in range(0, len(part), BLOCK):
        stop = min(start + BLOCK, len(part))
        first = min(start, lengths[0])  # every query of the block sees the context before it
        query, key = torch.arange(start, stop)[:, None], torch.arange(first, stop)[None]
        seen = (key <= query) & ((part[key] == part[query]) | (part[key] == 0))
        added = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        yield Block(begin, begin + start, begin + stop, begin + first, added)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, choices: Row | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend within each question. Query ``(1, heads, length, size)``, key and value with their own number of heads."""
    if choices is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError("attention of choices needs one whole row of questions")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("attention of choices knows no soft cap and no sinks")
    _, heads, length, size = query.shape
    groups, kind, layer = key.shape[1], query.device.type, int(getattr(module, "layer_idx"))  # noqa: B009
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    with torch.autocast(kind, enabled=False):
        asked = (query[0] * (scaling or size**-0.5)).to(dtype).contiguous().view(groups, heads // groups, length, size)
        keys, values = key[0].to(dtype).contiguous(), value[0].to(dtype).contiguous()
        if choices.keep:
            choices.kept[layer] = keys, values
        before = choices.prefix.get(layer)
        result = values.new_empty(length, heads, values.shape[-1])
        for block in choices.blocks:
            start, stop = block.start, block.stop
            met, given = keys[:, block.begin : stop], values[:, block.begin : stop]
            if before is not None:
                met, given = torch.cat([before[0], met], 1), torch.cat([before[1], given], 1)
            scores = torch.bmm(asked[:, :, start:stop].flatten(1, 2), met.transpose(1, 2)).float()
            scores.view(*asked.shape[:2], stop - start, -1)[..., block.first - stop :].add_(block.added)
            found = torch.bmm(scores.softmax(-1).to(dtype), given)
            result[start:stop] = found.view(heads, stop - start, -1).transpose(0, 1)
    return result[None], None


AttentionInterface.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)


@contextmanager
def attending(causal: Any, name: str = NAME) -> Iterator[None]:
    """Within, a model attends by a registered function; what that function needs goes with every forward pass, by keyword."""
    config = causal.config.get_text_config()
    own = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = own
