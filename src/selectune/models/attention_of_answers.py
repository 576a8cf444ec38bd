"""Attention of answers being written, a token each in one row, to prompts whose keys and values were kept.

Knows: one shared beginning that is kept once for all answers, room for what each prompt and answer adds to it, which grows in
steps and is not copied in between, and answers that end and make place for others. The sums are those of a cache for every answer by itself.
Does not know: which tokens are written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from selectune.models.attention_of_choices import KeysAndValues

NAME = "selectune_of_answers"


STEP = 128
"""Tokens by which room grows."""


class Answers:
    """Keys and values of answers being written; those in work are numbers 0 to ``count - 1``.

    Args:
        prefix: keys and values of the shared beginning, by layer; empty without one.
    """

    def __init__(self, prefix: KeysAndValues) -> None:
        self.prefix = prefix
        self._own: KeysAndValues = {}
        self.lengths: list[int] = []

    @property
    def count(self) -> int:
        """Answers in work."""
        return len(self.lengths)

    def enter(self, kept: KeysAndValues, lengths: list[int]) -> None:
        """Take in the keys and values of the rests of some prompts, laid end to end in one row."""
        for layer, states in kept.items():
            own = self._own.get(layer) or tuple(x.new_empty(0, x.shape[0], 0, x.shape[-1]) for x in states)
            keys, values = (_with_room(mine, self.count + len(lengths), max(lengths)) for mine in own)
            self._own[layer] = keys, values
            for mine, row in zip((keys, values), states, strict=True):
                begin = 0
                for place, length in enumerate(lengths, self.count):
                    mine[place, :, :length] = row[:, begin : begin + length]
                    begin += length
        self.lengths += lengths

    def leave(self, place: int) -> None:
        """Let an answer go; the last one takes its number."""
        last = self.count - 1
        if place != last:
            for states in self._own.values():
                for mine in states:
                    mine[place, :, : self.lengths[last]] = mine[last, :, : self.lengths[last]]
            self.lengths[place] = self.lengths[last]
        self.lengths.pop()

    def begin_step(self) -> None:
        """Make every answer a token longer; each layer then writes that token's keys and values."""
        self.lengths = [length + 1 for length in self.lengths]
        self._ends = torch.tensor(self.lengths)
        length = max(self.lengths)
        self._own = {
            layer: (_with_room(keys, self.count, length), _with_room(values, self.count, length))
            for layer, (keys, values) in self._own.items()
        }
        later = torch.arange(length)[None] >= self._ends[:, None]
        self._added = torch.zeros(later.shape).masked_fill_(later, float("-inf"))[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from one token of each answer. Query ``(answers, key heads, heads per key, size)``, scaled; key and value
        ``(answers, key heads, size)``. Returns ``(answers, heads, size)``."""
        count, groups, each, size = query.shape
        for mine, new in zip(self._own[layer], (key, value), strict=True):
            mine[torch.arange(count), :, self._ends - 1] = new
        length = self._added.shape[-1]
        keys, values = (mine.flatten(0, 1)[: count * groups, :length] for mine in self._own[layer])
        scores = torch.bmm(query.reshape(count * groups, each, size), keys.transpose(1, 2)).float()
        scores = scores.view(count, groups, each, length).add_(self._added)
        if layer not in self.prefix:
            weights = scores.softmax(-1).to(value.dtype)
            return torch.bmm(weights.flatten(0, 1), values).view(count, groups * each, -1)
        first_keys, first_values = self.prefix[layer]
        asked = query.transpose(0, 1).reshape(groups, count * each, size)
        first = torch.bmm(asked, first_keys.transpose(1, 2)).float().view(groups, count, each, -1).transpose(0, 1)
        weights = torch.cat([first, scores], -1).softmax(-1).to(value.dtype)
        early, late = weights.split([first.shape[-1], length], -1)
        found = torch.bmm(early.transpose(0, 1).reshape(groups, count * each, -1), first_values)
        rest = torch.bmm(late.reshape(count * groups, each, length), values).view(count, groups, each, -1)
        return (rest + found.view(groups, count, each, -1).transpose(0, 1)).reshape(count, groups * each, -1)


def _with_room(states: Tensor, answers: int, tokens: int) -> Tensor:
    """Return keys or values, ``(answers, key heads, tokens, size)``, copied to a larger place where room is short."""
    have, heads, room, size = states.shape
    if answers <= have and tokens <= room:
        return states
    larger = states.new_zeros(max(answers, have), heads, max(-(-tokens // STEP) * STEP, room), size)
    larger[:have, :, :room] = states
    return larger


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, answers: Answers | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend from one token of each answer. Query ``(1, heads, answers, size)``, key and value with their own number of heads."""
    if answers is None or query.shape[0] != 1 or query.shape[2] != answers.count or key.shape[2] != answers.count:
        raise ValueError("attention of answers needs one token of each answer in one row")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("attention of answers knows no soft cap and no sinks")
    _, heads, count, size = query.shape
    groups, dtype = key.shape[1], query.dtype
    asked = (query[0] * (scaling or size**-0.5)).transpose(0, 1).reshape(count, groups, heads // groups, size)
    layer = int(getattr(module, "layer_idx"))  # noqa: B009
    found = answers.attend(layer, asked, key[0].transpose(0, 1).to(dtype), value[0].transpose(0, 1).to(dtype))
    return found[None], None


AttentionInterface.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)
