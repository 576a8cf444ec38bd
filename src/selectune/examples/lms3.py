"""Records that the last layer's attention finds near to the target's questions, and whose values are steady (LMS3).

Knows: the state of a question's last token, what the last block's query and key matrices make of it, how steady its value is, and which records are
too far to help. Does not know: how states are kept.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from selectune.data.chat import Encoded
from selectune.data.records import Record
from selectune.examples.factors.last_block import last_linear
from selectune.examples.factors.signals import Signal, Worker
from selectune.examples.factors.store import measure
from selectune.examples.method import Array, Ranked
from selectune.examples.pool import Pool

TARGETS = 16
"""Target records whose distances to all records are held at once."""


class LastState(Signal):
    """The base's last hidden state at a question's last token, fp32."""

    shown: ClassVar[str] = "state of the last token"
    width: ClassVar[int | None] = 0
    tokens: int = 128
    """Of the question that are read."""

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        assert worker is not None
        limit = min(self.tokens, worker.encoder.max_length)
        read = [worker.base.tokenizer(record.question)["input_ids"][:limit] for record in records]
        pieces = [Encoded(ids, [-100] * len(ids)) for ids in (some or [worker.base.tokenizer.eos_token_id] for some in read)]
        found = np.zeros((len(records), worker.base.anatomy.hidden_size), dtype=np.float32)
        for member, hidden, _ in worker.states(pieces):
            found[member] = hidden[-1].float().cpu().numpy()
        return found


def attention_matrices(base: Any) -> tuple[Tensor, Tensor]:
    """Return ``W_k^T W_q`` of the last block, summed over query heads, each with the key head it shares, and ``W_v``; fp32.

    Returns:
        ``(hidden, hidden)`` and ``(values, hidden)``.

    Raises:
        UserError: the last block has no such layers.
    """
    query, key, value = (_weight(base, role) for role in ("query", "key", "value"))
    block = base.anatomy.blocks[-1]
    by_head = key.view(block.key_value_heads, -1, key.shape[1]).repeat_interleave(block.heads // block.key_value_heads, dim=0)
    return by_head.reshape(query.shape).T @ query, value


def _weight(base: Any, role: str) -> Tensor:
    layer = last_linear(base, role)
    module = base.model.get_submodule(layer.module)
    weight = module.weight.detach().float()
    weight = weight.T if type(module).__name__.endswith("Conv1D") else weight
    return weight if layer.outputs is None else weight[layer.outputs]


def nearest_and_steady(distances: Array, steadiness: Array, accepted: float) -> tuple[Array, Array]:
    """Return each record's smallest product of distance and steadiness over the targets that accept it (over all, where none does), and whether one
    does; both ``(records,)``.

    Args:
        distances: ``(targets, records)``. steadiness: ``(records,)``. accepted: share of the records, the nearest, that a target accepts; one at
            least, unless it is 0.
    """
    count = max(1, round(accepted * distances.shape[1])) if accepted else 0
    taken = np.zeros(distances.shape, dtype=bool)
    if count:
        np.put_along_axis(taken, np.argsort(distances, axis=1, kind="stable")[:, :count], True, axis=1)
    products, some = distances * steadiness, np.asarray(taken.any(0))
    return np.where(some, np.where(taken, products, np.inf).min(0), products.min(0)), some


class SimilarAndStable(Ranked):
    """The records that would be the best demonstrations for the target's questions."""

    name: ClassVar[str] = "lms3"
    family: ClassVar[str] = "target"
    paper: ClassVar[str] = (
        "What Makes In-context Learning Effective for Mathematical Reasoning: A Theoretical Analysis, ICML 2025, arXiv 2412.12157"
    )
    summary: ClassVar[str] = (
        "The smallest product of attention-space distance to a target question and value norm; the far ones last."
    )
    departs: ClassVar[str] = (
        "A demonstration's score becomes a choice of training records: each counts with its best target question. The last real token is read and "
        "the key matrix transposed, as the paper writes and its code does not. A target question accepts one record at least."
    )
    needs_target: ClassVar[bool] = True

    accepted: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the pool, the nearest, that a target question accepts (lambda); records that none accepts come last."""
    tokens: Annotated[int, Field(gt=0)] = 128
    """Of a question that are read."""

    def score(self, pool: Pool) -> dict[str, Array]:
        signal = LastState(tokens=self.tokens)
        order = pool.order
        states, targets = torch.tensor(measure(pool, signal)[order]), torch.tensor(measure(pool, signal, pool.target))
        product, value = (matrix.cpu() for matrix in attention_matrices(pool.base))
        moved, steady = states @ product.T, torch.linalg.vector_norm(states @ value.T, dim=1).numpy().astype(np.float64)
        best, accepted = np.full(len(pool), np.inf), np.zeros(len(pool), dtype=bool)
        for some in targets.split(TARGETS):
            distances = torch.cdist(some, moved, compute_mode="donot_use_mm_for_euclid_dist").numpy()
            found, taken = nearest_and_steady(distances, steady, self.accepted)
            better = (taken & ~accepted) | ((taken == accepted) & (found < best))
            best, accepted = np.where(better, found, best), accepted | taken
        scores, kept = np.empty(len(pool)), np.empty(len(pool))
        fit = np.where(
            accepted, 1 / (1 + best), -best / (1 + best)
        )  # higher is better; every accepted one is above 0, every other below
        scores[order], kept[order] = fit, accepted
        return {"fit": scores, "accepted": kept}
