"""Attention of packed records on a CPU, each by itself: products that a mask would throw away are never made.

Knows: causal attention within the records of packed sequences, forward and backward, and how transformers is told to attend this
way. The sums are those of a block-diagonal causal mask. Does not know: how records are packed, and losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from selectune.data.packing import Spans, record_spans, rounded

NAME = "selectune_by_record"

BLOCK = 128
"""Queries whose scores are made at once: keys after them are never met."""
KEPT_LENGTH = 512
"""Records up to this length keep their attention weights for the backward pass; longer ones make them again."""


class _ByRecord(torch.autograd.Function):
    """Causal attention within each record, a block of queries at a time; heads that share a key are one product.

    Query ``(key heads, heads per key, tokens, size)``, key and value ``(key heads, tokens, size)``.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Spans) -> Tensor:
        query = query * scale
        result = query.new_zeros(*query.shape[:3], value.shape[-1])
        kept = []
        for start, end in spans:
            for a, b, stop in _blocks(start, end, query.shape[2]):
                weights = _weights(query, key, start, a, stop)
                found = torch.bmm(weights, value[:, start:stop]).view(*result.shape[:2], stop - a, -1)
                result[:, :, a:b] = found[:, :, : b - a]
                if end - start <= KEPT_LENGTH:
                    kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale, ctx.spans = scale, spans
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (gradient,) = gradients
        query, key, value, *rest = ctx.saved_tensors
        kept = iter(rest)
        of_query, of_key, of_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for start, end in ctx.spans:
            for a, b, stop in _blocks(start, end, query.shape[2]):
                weights = next(kept) if end - start <= KEPT_LENGTH else _weights(query, key, start, a, stop)
                asked = query[:, :, a:stop].flatten(1, 2)
                wanted = gradient[:, :, a:stop].clone(memory_format=torch.contiguous_format)
                wanted[:, :, b - a :] = 0  # queries of the next record, there to fill up the block
                wanted = wanted.flatten(1, 2)
                of_value[:, start:stop].add_(torch.bmm(weights.transpose(1, 2), wanted))
                of_weights = torch.bmm(wanted, value[:, start:stop].transpose(1, 2))
                of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                found = torch.bmm(of_scores, key[:, start:stop]).view(*query.shape[:2], stop - a, -1)
                of_query[:, :, a:b] = found[:, :, : b - a]
                of_key[:, start:stop].add_(torch.bmm(of_scores.transpose(1, 2), asked))
        return of_query.mul_(ctx.scale), of_key, of_value, None, None


def _blocks(start: int, end: int, tokens: int) -> list[tuple[int, int, int]]:
    """Cut a record into blocks of queries, ``(first, end, end of what is computed)``: sizes are rounded up, where tokens follow."""
    blocks = []
    for a in range(start, end, BLOCK):
        b = min(a + BLOCK, end)
        stop = a + rounded(b - a)
        blocks.append((a, b, stop if stop <= tokens else b))
    return blocks


def _weights(query: Tensor, key: Tensor, start: int, a: int, b: int) -> Tensor:
    """Return the attention weights of queries ``a`` to ``b``, ``(key heads, heads per key x queries, keys)``."""
    scores = torch.bmm(query[:, :, a:b].flatten(1, 2), key[:, start:b].transpose(1, 2))
    scores.view(*query.shape[:2], b - a, b - start)[..., a - start :].add_(_later(b - a, scores.dtype))
    return scores.softmax(-1)


@cache
def _later(count: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores of later tokens: minus infinity."""
    return torch.full((count, count), float("-inf"), dtype=dtype).triu(1)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, records: Spans | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend within each record. Query ``(batch, heads, length, size)``, key and value with their own number of heads."""
    if records is None or query.shape[2] != key.shape[2] or dropout:
        raise ValueError("attention by record needs the records of whole sequences, and no dropout")
    batch, heads, length, size = query.shape
    groups, kind = key.shape[1], query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype

    def flat(states: Tensor) -> Tensor:
        return states.to(dtype).transpose(0, 1).reshape(states.shape[1], batch * length, states.shape[-1])

    asked = flat(query).view(groups, heads // groups, batch * length, size)
    with torch.autocast(kind, enabled=False):
        found: Any = _ByRecord.apply(asked, flat(key), flat(value), scaling or size**-0.5, records)  # type: ignore[no-untyped-call]
    return found.view(heads, batch, length, -1).permute(1, 2, 0, 3).contiguous(), None


AttentionInterface.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)


@contextmanager
def attend_by_record(causal: Any, rows: list[dict[str, Tensor]], bfloat16: bool | None = None) -> Iterator[bool]:
    """Within, a model attends by record, if that gives what its own attention gives on a few packed sequences.

    Args:
        causal: a transformers causal model. rows: packed sequences with ``input_ids``, ``position_ids`` and ``labels``.
        bfloat16: whether autocast will compute in bf16; None: where the weights are.

    Yields:
        Whether it does: then every forward pass must be given ``records=record_spans(...)``. It does not on an accelerator (its
        own kernels are faster), with dropout in attention, or where attention is windowed, capped or of a kind of its own.
    """
    config = causal.config.get_text_config()
    own = config._attn_implementation
    here = next(causal.parameters()).device.type == "cpu" and not getattr(config, "attention_dropout", 0.0)
    works = here and own == "sdpa" and bool(rows) and _agrees(causal, config, _of_one_length(rows[:2]), bfloat16)
    if works:
        config._attn_implementation = NAME
    try:
        yield works
    finally:
        config._attn_implementation = own


def _of_one_length(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [row for row in rows if len(row["input_ids"]) == len(rows[0]["input_ids"])]


@torch.no_grad()
def _agrees(causal: Any, config: Any, rows: list[dict[str, Tensor]], bfloat16: bool | None) -> bool:
    """Whether both ways give the same hidden states where something is learnt (everywhere, where nothing is), in the dtype of the computation."""
    if bfloat16 is None:
        bfloat16 = next(causal.parameters()).dtype == torch.bfloat16
    decoder = getattr(causal, causal.base_model_prefix)
    device = next(causal.parameters()).device
    batch = {key: torch.stack([row[key] for row in rows]).to(device) for key in ("input_ids", "position_ids", "labels")}
    learnt = batch["labels"] != -100
    labels, looked_at = (batch["labels"], learnt) if learnt.any() else (None, torch.ones_like(learnt))
    training, own, found = causal.training, config._attn_implementation, []
    causal.eval()
    try:
        for name in (own, NAME):
            config._attn_implementation = name
            extra = {"records": record_spans(batch["position_ids"], labels)} if name == NAME else {}
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                hidden = decoder(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **extra)
            found.append(hidden.last_hidden_state.float()[looked_at])
    except (ValueError, TypeError):  # an architecture that does not hand the records on, or takes no other attention
        return False
    finally:
        config._attn_implementation = own
        causal.train(training)
    difference = (found[0] - found[1]).norm() / found[0].norm().clamp(min=1e-6)
    return bool(difference < (3e-2 if bfloat16 else 1e-4))
