"""Blocks of the common kind, only read, in few passes over memory on a CPU.

Knows: the decoder that Llama and its kin share (norm, attention with rotated positions over grouped heads, norm, gated unit), run over
questions laid end to end: what is added up over the blocks is fp32 and added in place, a norm gives the dtype of the products at
once, and behind the last attention only the tokens that are asked for go on. Whether a model is of this kind is for the caller to try.
Does not know: what is asked, other kinds of blocks, and backward passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selectune.models.attention_of_choices import Row


class ShortDecoder:
    """The decoder of a causal model; its modules are called as they are, adapters included.

    Args:
        causal: a transformers causal model. dtype: of the products.

    Raises:
        AttributeError: the model's blocks are not of this kind.
    """

    def __init__(self, causal: Any, dtype: torch.dtype) -> None:
        decoder = getattr(causal, causal.base_model_prefix)
        self._dtype, self._embeddings, self._rotary, self._last = (
            dtype,
            causal.get_input_embeddings(),
            decoder.rotary_emb,
            decoder.norm,
        )
        self._blocks = [
            (block.input_layernorm, block.self_attn, block.post_attention_layernorm, block.mlp) for block in decoder.layers
        ]

    @torch.no_grad()
    def __call__(self, ids: Tensor, positions: Tensor, row: Row, places: Tensor) -> Tensor:
        """Return the last hidden states of some tokens, ``(places, hidden)`` fp32.

        Args:
            ids, positions: ``(1, tokens)`` int64. row: the questions. places: ``(places)`` int64, in the row.
        """
        states = self._embeddings(ids[0]).float()
        turns = [part[0, :, None] for part in self._rotary(states[None], position_ids=positions)]
        for number, (first, attention, second, unit) in enumerate(self._blocks):
            found = self._attended(attention, _norm(first, states, self._dtype), turns, row)
            if number == len(self._blocks) - 1:
                states, found = states[places], found[places]
            states.add_(attention.o_proj(found))
            inner = _norm(second, states, self._dtype)
            states.add_(unit.down_proj(unit.act_fn(unit.gate_proj(inner)).mul_(unit.up_proj(inner))))
        return _norm(self._last, states, states.dtype)

    def _attended(self, attention: Any, states: Tensor, turns: list[Tensor], row: Row) -> Tensor:
        """Return what the heads found, ``(tokens, heads x size)``."""
        scaled = [turn * attention.scaling for turn in turns]
        query = _turned(attention.q_proj(states), *scaled)
        key = _turned(attention.k_proj(states), *turns)
        value = attention.v_proj(states).view(key.shape)
        return row.attend(attention.layer_idx, query, key, value).flatten(1)


def _norm(module: Any, states: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``weight * x / sqrt(mean(x^2) + epsilon)``, computed in fp32 and rounded once."""
    square = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square_().div_(states.shape[-1])
    return (states * square.add_(module.variance_epsilon).rsqrt_()).mul_(module.weight.float()).to(dtype)


def _turned(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn each head's halves by the positions: ``(tokens, heads x size)`` to ``(tokens, heads, size)`` in the dtype given."""
    size = cosines.shape[-1]
    wide = states.view(len(states), -1, size).float()
    turned = wide * cosines
    for to, other, sign in (
        (turned[..., : size // 2], wide[..., size // 2 :], -1),
        (turned[..., size // 2 :], wide[..., : size // 2], 1),
    ):
        to.addcmul_(other, sines[..., : size // 2], value=sign)
    return turned.to(states.dtype)
