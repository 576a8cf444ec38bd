"""Attention of questions laid end to end in one row on a CPU: no padding of the row, and no mask over what cannot be seen anyway.

Knows: a row in which every question is a context and continuations that are blind to one another, all questions behind one
shared beginning whose keys and values were kept; questions of about one length, whose products are made together; how
transformers is told to attend this way. The sums are those of a dense mask.
Does not know: what is asked, and backward passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from selectune.data.packing import rounded

NAME = "selectune_of_choices"

BLOCK = 256
"""Queries of a question whose scores are made at once: keys after them are never met."""
SCORES = 1 << 19
"""Scores of a head that are made at once (of one question, where it has more)."""

KeysAndValues = dict[int, tuple[Tensor, Tensor]]
"""By layer: keys and values, each ``(key heads, tokens, size)``."""


@dataclass
class Block:
    """Some queries of questions of about one length.

    ``tokens``: the queries' places in the row, ``(questions, queries)``. ``added``: what goes to the scores of the questions' own
    keys, ``(questions, 1, queries, keys)``: minus infinity where one is not seen.
    """

    tokens: Tensor
    added: Tensor


@dataclass
class Group:
    """Questions of about one length: the places of their tokens, ``(questions, length)``, and their queries in blocks.

    What fills a question up to the length has the place -1: nobody sees it, and nobody reads its results.
    """

    tokens: Tensor
    blocks: list[Block]


class Row:
    """What attention must know of one row of questions.

    Args:
        parts: for each question the lengths of its context and of its continuations, in the order of the row.
        prefix: keys and values of the shared beginning. keep: keep the keys and values of this row, in ``kept``.
    """

    def __init__(self, parts: Sequence[Sequence[int]], prefix: KeysAndValues | None = None, keep: bool = False) -> None:
        self.prefix, self.keep = prefix or {}, keep
        self.kept: KeysAndValues = {}
        self.tokens = sum(map(sum, parts))
        self.groups = list(_groups(parts, next((keys.shape[1] for keys, _ in self.prefix.values()), 0)))
        self._indices: list[tuple[Tensor, list[tuple[Tensor, Tensor]]]] = []
        self._results = torch.empty(0)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within each question.

        Args:
            query: ``(tokens, heads, size)``, scaled. key, value: ``(tokens, key heads, size)``. All of one dtype; tokens after those of
                the questions fill up the row.

        Returns:
            ``(tokens, heads, size)``.
        """
        (length, heads, size), shared = query.shape, key.shape[1]
        if not self._indices:
            self._prepare(length, shared, heads // shared, query.dtype)
        if self.keep:
            self.kept[layer] = _by_head(key[: self.tokens]), _by_head(value[: self.tokens])
        query, key, value = (states.reshape(-1, states.shape[-1]) for states in (query, key, value))
        before, found = self.prefix.get(layer), []
        for group, (index, blocks) in zip(self.groups, self._indices, strict=True):
            count, own = group.tokens.shape
            met, given = (states.index_select(0, index).view(shared * count, own, -1) for states in (key, value))
            if before is not None:
                met, given = (torch.cat([x.repeat_interleave(count, 0), y], 1) for x, y in zip(before, (met, given), strict=True))
            start = met.shape[1] - own
            for asking, added in blocks:
                seen = start + added.shape[-1]
                asked = query.index_select(0, asking).view(shared * count, -1, size)
                scores = torch.bmm(asked, met[:, :seen].transpose(1, 2))
                scores.view(shared, count, heads // shared, -1, seen)[..., start:].add_(added)
                found.append(torch.bmm(scores.softmax(-1), given[:, :seen]).view(-1, value.shape[-1]))
        return torch.cat(found).index_select(0, self._results).view(length, heads, -1)

    def _prepare(self, length: int, shared: int, each: int, dtype: torch.dtype) -> None:
        """Find which states, laid out as ``(tokens x heads, size)``, every product takes, and where each result lies. The same in all layers."""
        results, begin = torch.zeros(length, shared * each, dtype=torch.int64), 0
        for group in self.groups:
            blocks = []
            for block in group.blocks:
                index = _of_heads(block.tokens, shared, each)
                real = (block.tokens >= 0)[None, :, None].expand(shared, -1, each, -1).flatten()
                results.view(-1)[index[real]] = real.nonzero().squeeze(-1) + begin
                begin += len(index)
                blocks.append((index, block.added.to(dtype)))
            self._indices.append((_of_heads(group.tokens, shared, 1), blocks))
        self._results = results.view(-1)


def _of_heads(tokens: Tensor, shared: int, each: int) -> Tensor:
    """Return the places of tokens, ``(questions, tokens)``, in all heads, by key head, question, head and token."""
    heads = torch.arange(shared * each).view(shared, 1, each, 1)
    return (tokens.clamp(min=0)[None, :, None] * (shared * each) + heads).flatten()


def _by_head(states: Tensor) -> Tensor:
    return states.transpose(0, 1).contiguous()


def _groups(parts: Sequence[Sequence[int]], before: int) -> Iterator[Group]:
    """Gather the questions of about one length."""
    found: dict[int, list[tuple[int, Sequence[int]]]] = {}
    begin = 0
    for lengths in parts:
        found.setdefault(rounded(sum(lengths)), []).append((begin, lengths))
        begin += sum(lengths)
    for length, members in found.items():
        most = max(1, SCORES // (min(length, BLOCK) * (before + length)))
        for first in range(0, len(members), most):
            yield _group(length, members[first : first + most])


def _group(length: int, members: Sequence[tuple[int, Sequence[int]]]) -> Group:
    """Lay questions side by side. What a query may not see: later tokens, and other continuations."""
    order = torch.arange(length)
    tokens, part = torch.full((len(members), length), -1), torch.full((len(members), length), -1)  # -1: what fills up
    for row, (begin, lengths) in enumerate(members):
        own = sum(lengths)
        tokens[row, :own] = torch.arange(begin, begin + own)
        part[row, :own] = torch.repeat_interleave(
            torch.arange(len(lengths)), torch.tensor(lengths)
        )  # 0: context, 1..: continuations
    blocks = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        asking, met = part[:, start:stop, None], part[:, None, :stop]
        seen = (order[None, :stop] <= order[start:stop, None]) & ((met == asking) | (met == 0))
        blocks.append(Block(tokens[:, start:stop], torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, None]))
    return Group(tokens, blocks)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, choices: Row | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend within each question. Query ``(1, heads, length, size)``, key and value with their own number of heads."""
    if choices is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError("attention of choices needs one whole row of questions")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("attention of choices knows no soft cap and no sinks")
    kind, layer = query.device.type, int(getattr(module, "layer_idx"))  # noqa: B009
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    with torch.autocast(kind, enabled=False):
        states = ((query * (scaling or query.shape[-1] ** -0.5)), key, value)
        return choices.attend(layer, *(x[0].transpose(0, 1).to(dtype) for x in states))[None], None


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
