"""What a short training tells of each record: its losses along the way, what it learnt, how it moved the output layer.

Knows: loss trajectories of a proxy and their clusters (S2L), normalised learnability (LoBaSS), and the change of the output layer's weight
by one record (DONOD). Does not know: how a trial is run.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from selectune.examples.factors.last_block import pieces_of
from selectune.examples.factors.learnt import Learnt, losses_along
from selectune.examples.factors.normalise import topsis
from selectune.examples.factors.signals import ResponseLoss, Signal, Worker
from selectune.examples.factors.store import measure
from selectune.examples.factors.strata import fair_shares, k_means, members, round_robin
from selectune.examples.method import Array, Choice, ExampleMethod, Ranked, ranked
from selectune.examples.pool import Pool


class Learnability(Ranked):
    """The records whose loss falls most, for its size, when the base is tuned on the pool."""

    name: ClassVar[str] = "lobass"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = "LoBaSS: Gauging Learnability in Supervised Fine-tuning Data, 2023, arXiv 2310.13008"
    summary: ClassVar[str] = (
        "The largest loss drop, relative to the base's loss, after a short training on the other half of the pool."
    )
    departs: ClassVar[str] = (
        "The drop is divided by the base's loss (the paper's normaliser is not known for sure). Two models are tuned, each on one half of the "
        "pool, and a record is measured by the one that has not seen it (the paper tunes one on all, which rewards what is memorised). They are "
        "short trials, which see only part of a large pool. Responses of fewer than eight tokens have no score."
    )

    steps: Annotated[int, Field(gt=0)] = 60
    """Of each short training."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Of each short training."""
    shortest: Annotated[int, Field(ge=0)] = 8
    """Response tokens below which a loss is too uncertain to count."""

    def score(self, pool: Pool) -> dict[str, Array]:
        before = measure(pool, ResponseLoss())
        after = self._crossed(pool)
        drop = (before - after) / np.maximum(before, 1e-3)
        return {"learnability": np.where(pool.tokens >= self.shortest, drop, np.nan), "loss": before, "loss after": after}

    def _crossed(self, pool: Pool) -> Array:
        """Return each record's loss after a training on the other half of the pool (on all, where that has nothing to learn).

        Equal records are in one half.
        """
        half = np.unique(pool.keys, return_inverse=True)[1] % 2
        after = np.empty(len(pool))
        for own in np.unique(half):
            others = [pool.records[place] for place in pool.order.tolist() if half[place] != own and pool.tokens[place]]
            measured = np.flatnonzero(half == own)
            learnt = Learnt(pool, self.steps, self.learning_rate, others or None)
            after[measured] = learnt.losses(pool.of([pool.records[place] for place in measured.tolist()]))
        return after


class Trajectories(ExampleMethod):
    """Records whose losses fall alike while a small proxy is trained are one group; every group is there."""

    name: ClassVar[str] = "s2l"
    family: ClassVar[str] = "diversity"
    paper: ClassVar[str] = (
        "SmallToLarge (S2L): Scalable Data Selection for Fine-tuning Large Language Models, NeurIPS 2024, arXiv 2403.07384"
    )
    summary: ClassVar[str] = "Equal shares of clusters of loss trajectories of a proxy that is trained on the pool."
    departs: ClassVar[str] = (
        "The base is its own proxy; it is trained once for a short while, in which it sees only part of a large pool, and is looked at eight times "
        "instead of ten or more. Groups of one source are not kept apart; above 20,000 records groups come from mini-batches. Records without a "
        "loss belong to no group and come last (the code calls their loss 0)."
    )

    clusters: Annotated[int, Field(gt=0)] | None = None
    """Groups; left out: a hundred, but at most a tenth of the budget."""
    checkpoints: Annotated[int, Field(gt=1)] = 8
    """Points of a trajectory: the base, then evenly along the training to its end."""
    steps: Annotated[int, Field(gt=0)] = 80
    """Of the proxy's training."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Of the proxy's training."""

    def choose(self, pool: Pool) -> Choice:
        trajectory = losses_along(pool, self.steps, self.learning_rate, self.checkpoints)
        known = np.isfinite(trajectory).all(1)
        if not known.all():
            pool.notes.append(f"{int((~known).sum()):,} records have no finite loss, belong to no group and come last")
        count, by_content = self.about(pool), pool.order[known[pool.order]]
        labels = np.full(len(pool), -1)
        if len(by_content):
            labels[by_content], _ = k_means(trajectory[by_content], self.clusters or max(1, min(100, count // 10)), pool.seed)
        drawn = ranked(pool, pool.uniform("s2l"))
        groups = members(labels, drawn[known[drawn]])  # -1 has no members
        large = [group for group in groups if len(group) > 2]
        small = [group for group in groups if len(group) <= 2]
        first = round_robin(large, fair_shares([len(group) for group in large], count)) if large else np.empty(0, np.int64)
        places = np.concatenate([first, *small, drawn[~known[drawn]]])
        signals = {f"loss at checkpoint {point}": trajectory[:, point] for point in range(self.checkpoints)}
        return Choice(self.fill(pool, places), {"cluster": np.where(known, labels, np.nan)} | signals)


class OutputGradient(Signal):
    """The gradient of a record's mean response loss in the output layer: its Frobenius norm, and its inner product with the weight; ``(records, 2)``.

    Of a text in several pieces the norm is the mean of theirs, weighed by their tokens.

    The gradient is never made: ``||G||^2 = sum over s, t of (d_s . d_t)(h_s . h_t)``, with ``d`` the gradient in what the layer says
    (``p - onehot``, and the slope of what is done to the logits after it, a soft cap for instance) and ``h`` the hidden states.
    """

    shown: ClassVar[str] = "gradient of the output layer"
    width: ClassVar[int | None] = 2

    def measure(self, worker: Worker | None, records: list[Any]) -> Array:
        assert worker is not None
        owners, pieces, counts = pieces_of(worker, records)
        found = np.full((len(records), 2), np.nan, dtype=np.float32)
        found[owners] = 0
        split = worker.loss.split
        head = split.causal.get_output_embeddings()
        for member, hidden, labels in worker.states(pieces):
            places = (labels[1:] != -100).nonzero().squeeze(-1)
            states, wanted = hidden[places], labels[places + 1]
            with torch.no_grad():
                said = head(states.to(head.weight.dtype)).float()
            with torch.enable_grad():
                said.requires_grad_(True)
                loss = torch.nn.functional.cross_entropy(split.finish(said), wanted, reduction="sum")
                (steep,) = torch.autograd.grad(loss, said)
            with torch.no_grad():
                by_weight = said if head.bias is None else said - head.bias
                along = (steep * by_weight).sum()  # <W, G>, with W h what the layer's weight says
                square = ((steep @ steep.T) * (states.float() @ states.float().T)).sum().clamp(min=0)
            found[owners[member]] += np.array([float(square.sqrt()), float(along)], dtype=np.float32) / counts[owners[member]]
        return found


class OutputChange(Ranked):
    """The records that would disturb the output layer least."""

    name: ClassVar[str] = "donod"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = (
        "DONOD: Efficient and Generalizable Instruction Fine-Tuning for LLMs via Model-Intrinsic Dataset Pruning, 2025, arXiv 2504.14810"
    )
    summary: ClassVar[str] = (
        "Closest to the ideal (TOPSIS) of least change and least growth of the output layer by one step on the record."
    )
    departs: ClassVar[str] = (
        "Both numbers are those of one small plain gradient step at the base (norm of the change, change of the norm) instead of a running pass "
        "with Adam, whose steps have nearly one size; which way growth counts is not known for sure and can be turned."
    )

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share that is kept (the paper prunes 70 %)."""
    growth_is_bad: bool = True
    """Whether a growing output layer counts against a record."""

    def score(self, pool: Pool) -> dict[str, Array]:
        found = measure(pool, OutputGradient()).astype(np.float64)
        weight = pool.base.model.get_output_embeddings().weight.detach().float()
        growth, change = -found[:, 1] / float(weight.norm()), found[:, 0]
        known, close = np.isfinite(change), np.full(len(pool), np.nan)
        if known.any():
            close[known] = topsis(np.stack([growth, change], axis=1)[known], (self.growth_is_bad, True))
        return {"closeness": close, "growth of the norm": growth, "norm of the change": change}
