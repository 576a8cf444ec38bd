"""Influence on the training loss, and effort of the model, spread over the whole range of scores (DEALRec).

Knows: the inverse-Hessian product by stochastic recursion, the influence of each record from it, and equal-width groups of a score filled from the
smallest up. Does not know: how effort is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from selectune.data.chat import Encoded
from selectune.examples.factors.curvature import hessian_product
from selectune.examples.factors.last_block import Effort, Linear, gradients_at, last_linear, pieces_of
from selectune.examples.factors.normalise import minimum_maximum
from selectune.examples.factors.store import BATCH, measure
from selectune.examples.factors.strata import fair_shares, members, round_robin
from selectune.examples.method import Array, Choice, ExampleMethod, ranked, something_trains, tell_unscored
from selectune.examples.pool import Pool
from selectune.progress import watched

Name = tuple[tuple[int, ...], tuple[int, ...]]
"""A piece's tokens and labels."""


def inverse_product(
    product: Callable[[int, Tensor], Tensor], gradient: Tensor, samples: Array, damping: float, scale: float, quiet: bool = True
) -> tuple[Tensor, float]:
    """Return ``scale (H + damping scale I)^-1 gradient`` and the scale, by ``h <- gradient + (1 - damping) h - H_s h / scale`` over samples s.

    The recursion diverges where a sample's largest curvature is above the scale; the scale is then doubled and all begins again.

    Args:
        product: a sample's Hessian times a vector. samples: ``(steps,)`` int64.
    """
    bound = 4 / damping * float(gradient.norm())
    while True:
        found = gradient.clone()
        for sample in watched(samples.tolist(), "inverse Hessian", quiet):
            found = gradient + (1 - damping) * found - product(sample, found) / scale
            if not float(found.norm()) <= bound:
                break
        else:
            return found, scale
        if scale > 1e12:
            return gradient, scale
        scale *= 2


class Surrogate:
    """The base as its own surrogate: only one matrix of its last block counts.

    Args:
        often: keys of records whose curvature is asked for again and again: what enters the last block, and the gradient behind it, is kept of them.
    """

    def __init__(self, pool: Pool, often: Collection[str] = ()) -> None:
        self.worker, self.quiet, self.often = pool.worker(), pool.quiet, set(often)
        self.layer: Linear = last_linear(pool.base, "down", "attention_output")
        self._entered: dict[Name, Tensor] = {}
        self._pulls: dict[Name, Tensor] = {}

    def mean_gradient(self, records: list[Any]) -> Tensor:
        """Return the mean of the gradients of the records' mean response losses, ``(outputs, inputs)`` fp32."""
        total: Tensor | None = None
        for _, inward, outward in self._each(records):
            product = outward.T @ inward
            total = product if total is None else total.add_(product)
        assert total is not None
        return total / len(records)

    def along(self, records: list[Any], direction: Tensor) -> Array:
        """Return the inner product of each record's gradient with a direction, ``(records,)``."""
        found = np.zeros(len(records))
        for number, inward, outward in self._each(records):
            found[number] += float(((inward @ direction.T) * outward).sum())
        return found

    def _each(self, records: list[Any]) -> Iterator[tuple[int, Tensor, Tensor]]:
        for start in watched(range(0, len(records), BATCH), "gradients of the last block", self.quiet):
            batch = records[start : start + BATCH]
            owners, pieces, counts = pieces_of(self.worker, batch)
            names = [_name(piece) for piece in pieces]
            known = {number: self._entered[name] for number, name in enumerate(names) if name in self._entered}
            for number, entered, inward, outward in gradients_at(self.worker, pieces, self.layer, known):
                owner = owners[number]
                if batch[owner].key in self.often and number not in known:
                    self._entered[names[number]] = entered.clone()
                yield start + owner, inward, outward / counts[owner]

    def hessian_product(self, record: Any, direction: Tensor) -> Tensor:
        """Return the Hessian of a record's mean response loss in the matrix, times a direction of its shape."""
        _, pieces, counts = pieces_of(self.worker, [record])
        total = torch.zeros_like(direction)
        for piece in pieces:
            name = _name(piece)
            entered, pull = self._entered.get(name), self._pulls.get(name)
            product, pull = hessian_product(self.worker, piece, self.layer, direction, entered, pull)
            if record.key in self.often:
                self._pulls[name] = pull
            total += product / counts[0]
        return total


def _name(piece: Encoded) -> Name:
    return tuple(piece.input_ids), tuple(piece.labels)


class InfluenceAndEffort(ExampleMethod):
    """Records over the whole range of influence and effort, without the very highest."""

    name: ClassVar[str] = "deal_rec"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = "Data-efficient Fine-tuning for LLM-based Recommendation, SIGIR 2024, arXiv 2401.17197"
    summary: ClassVar[str] = (
        "Influence on the training loss plus effort (a gradient's norm); the highest are left out, equal-width groups of the rest are filled evenly."
    )
    departs: ClassVar[str] = (
        "The base is its own surrogate: influence is in the last block's MLP output, a recommender is not trained; the recursion's scale is doubled "
        "where it would diverge."
    )

    effort: Annotated[float, Field(ge=0)] = 0.3
    """Weight of effort against influence (lambda)."""
    hardest: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the highest scores that come last."""
    groups: Annotated[int, Field(gt=0)] = 20
    """Of equal width over the scores that are left."""
    steps: Annotated[int, Field(gt=0)] = 500
    """Of the recursion (the paper: 5,000), a record each; of each what enters the last block stays in memory."""
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Of the recursion; the Hessian's effective damping is this times ``scale``."""
    scale: Annotated[float, Field(gt=0)] = 25.0
    """Of the recursion: above the largest curvature."""

    def choose(self, pool: Pool) -> Choice:
        something_trains(pool)
        silent = pool.tokens == 0
        influence, effort = (np.where(silent, np.nan, found) for found in (self.influence(pool), measure(pool, Effort())))
        score = minimum_maximum(influence) + self.effort * minimum_maximum(effort)
        tell_unscored(pool, score)
        places = self.spread(pool, score)
        return Choice(self.fill(pool, places), {"score": score, "influence": influence, "effort": effort})

    def influence(self, pool: Pool) -> Array:
        """Return how much the pool's mean loss would rise without each record, but for a constant; ``(records,)``."""
        by_key = {pool.keys[place]: pool.records[place] for place in pool.order}
        samples = pool.generator("deal_rec").integers(len(pool), size=self.steps)
        surrogate, each = Surrogate(pool, {pool.keys[place] for place in pool.order[samples]}), list(by_key.values())
        gradient = surrogate.mean_gradient([pool.records[place] for place in pool.order])

        def product(sample: int, direction: Tensor) -> Tensor:
            return surrogate.hessian_product(pool.records[pool.order[sample]], direction)

        solved, scale = inverse_product(product, gradient, samples, self.damping, self.scale, pool.quiet)
        if scale > self.scale:
            pool.notes.append(f"the recursion's scale was raised to {scale:g}")
        known = dict(zip(by_key, surrogate.along(each, solved).tolist(), strict=True))
        return np.array([known[key] for key in pool.keys])

    def spread(self, pool: Pool, score: Array) -> Array:
        """Return all places: those of the groups evenly, at random within each; then the hardest, the easier of them first; then those that have no
        score."""
        by_score, unknown = np.split(ranked(pool, score), [int(np.isfinite(score).sum())])
        hardest = by_score[: int(self.hardest * len(by_score))]
        rest = by_score[len(hardest) :]
        low, high = (score[rest].min(), score[rest].max()) if len(rest) else (0.0, 0.0)
        width = (high - low) / self.groups
        group = np.full(len(pool), -1, dtype=np.int64)
        group[rest] = np.minimum((score[rest] - low) / width, self.groups - 1).astype(np.int64) if width > 0 else 0
        drawn = ranked(pool, pool.uniform("deal_rec"))
        groups = members(group, drawn[group[drawn] >= 0]) if len(rest) else []
        groups = [some for some in groups if len(some)]
        evenly = round_robin(groups, fair_shares([len(some) for some in groups], self.about(pool)))
        return np.concatenate([evenly, hardest[::-1], unknown])
