"""Each client its own blocks, chosen together: where a client's gradient is large, and where the others train too.

Knows: the objective, its solvers, and the weights of averaging. Does not know: how clients' training runs are kept apart; on one machine
the union of their choices trains.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.parameters.factors.allocation import best
from selectune.parameters.factors.gradients import first
from selectune.parameters.factors.sensitivity import sensitivities
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.data import Record

ENUMERATED = 100_000
"""Combinations of masks up to which the best is found by trying all."""


def objective(gains: Tensor, masks: Tensor, penalty: float) -> Tensor:
    """Return ``sum m G - penalty * sum over pairs of clients and layers of (m_i - m_j)^2``.

    Args:
        gains: ``(clients, layers)`` fp64. masks: ``(..., clients, layers)`` of 0 and 1.
    """
    votes = masks.sum(-2)
    return (masks * gains).sum((-1, -2)) - penalty * (votes * (masks.shape[-2] - votes)).sum(-1)


def solve(gains: Tensor, budgets: Sequence[int], penalty: float, exact: bool | None = None) -> Tensor:
    """Return the masks of 0 and 1, ``(clients, layers)`` fp64, that maximise the objective with at most ``budgets`` layers a client.

    What is left of a budget goes to the client's own layers with the largest gains.

    Args:
        gains: ``(clients, layers)``, none negative. exact: enumerate (the global optimum) or go up client by client (a local one); left
            out: enumerate where there are few combinations.
    """
    gains = gains.double()
    layers = gains.shape[1]
    options = (
        [[c for size in range(budget + 1) for c in combinations(range(layers), size)] for budget in budgets]
        if layers <= 12
        else []
    )
    number = 1
    for each in options:
        number *= len(each)
    if exact if exact is not None else bool(options) and number <= ENUMERATED:
        masks = _enumerated(gains, options, penalty)
    else:
        own = torch.stack([_mask(row, budget) for row, budget in zip(gains, budgets, strict=True)])
        common = torch.stack([_mask(gains.sum(0), budget) for budget in budgets])
        found = [_ascent(gains, start, budgets, penalty) for start in (own, common)]
        masks = max(found, key=lambda one: float(objective(gains, one, penalty)))
    for client, budget in enumerate(budgets):
        left = budget - int(masks[client].sum())
        masks[client, best(gains[client].masked_fill(masks[client] > 0, float("-inf")), left)] = 1
    return masks


def _mask(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(scores), dtype=torch.float64)
    mask[best(scores, count)] = 1
    return mask


def _enumerated(gains: Tensor, options: Sequence[Sequence[tuple[int, ...]]], penalty: float) -> Tensor:
    layers = gains.shape[1]
    sides = [
        torch.stack([torch.tensor([float(i in c) for i in range(layers)], dtype=torch.float64) for c in each]) for each in options
    ]
    places = torch.cartesian_prod(*[torch.arange(len(side)) for side in sides]).view(-1, len(sides))
    values = torch.cat([
        objective(gains, torch.stack([side[part[:, i]] for i, side in enumerate(sides)], dim=1), penalty) for part in places.split(10_000)
    ])  # fmt: skip
    return torch.stack([side[place] for side, place in zip(sides, places[int(values.argmax())].tolist(), strict=True)])


def _ascent(gains: Tensor, masks: Tensor, budgets: Sequence[int], penalty: float) -> Tensor:
    """Each client in turn takes its best layers given the others', until nobody changes; the objective never falls."""
    masks, others = masks.clone(), gains.shape[0] - 1
    for _ in range(100):
        before = masks.clone()
        for client, budget in enumerate(budgets):
            votes = masks.sum(0) - masks[client]
            worth = gains[client] + penalty * (2 * votes - others)
            masks[client] = _mask(worth, budget) * (worth > 0)
        if torch.equal(masks, before):
            break
    return masks


def averaging_weights(masks: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return each client's weight in the average of each layer, ``(clients, layers)``: by its records, among those that train the layer.

    A layer that nobody trains has weights of zero and stays as it is.
    """
    shares = masks * torch.tensor(sizes, dtype=masks.dtype)[:, None]
    return shares / shares.sum(0).clamp(min=1e-300)


class FederatedLayers(ParameterMethod):
    """The union of the clients' blocks."""

    name: ClassVar[str] = "federated_layers"
    family: ClassVar[str] = "blocks"
    usual_form: ClassVar[str] = "lora"
    paper: ClassVar[str] = "Exploring Selective Layer Fine-Tuning in Federated Learning, ISIT 2025, arXiv 2408.15600"
    summary: ClassVar[str] = "Blocks with large gradients in each part of the data, drawn together by a penalty on disagreement."
    departs: ClassVar[str] = (
        "One machine: clients are the records' files or equal shards, and the union of their blocks trains on everything, chosen once. "
        "Gradients are of single packs of records; the released code sums the norms of running sums. The penalty is in units of the median gain. "
        "The chosen blocks train by LoRA where no form is named; `form: full` is the paper's."
    )

    k: Annotated[int, Field(gt=0)] = 6
    """Blocks of each client."""
    clients: Annotated[int, Field(gt=0)] = 4
    """Shards of the training records, where they come from one file."""
    by: Literal["auto", "source", "shard"] = "auto"
    """Whose data a client has: a file's, a shard's by hash of the records' content, or files where there are several."""
    penalty: Annotated[float, Field(ge=0)] = 0.1
    """On each disagreement of two clients on a block, in units of the median gain; 0: each its own best blocks."""
    score: Literal["gradient", "relative", "signal_to_noise"] = "gradient"
    """A block's gain: squared norm of its gradient, the same relative to its weights', or signal to noise."""
    examples: Annotated[int, Field(gt=0)] = 32
    """Training records of each client."""

    def select(self, context: Context) -> Selection:
        blocks, model = context.base.anatomy.blocks, context.base.model
        if self.k > len(blocks):
            raise UserError(f"{self.k} blocks are asked for and the base has {len(blocks)}", field="parameters.k",
                            expected=f"at most {len(blocks)}")  # fmt: skip
        split = self.split(context.train)
        clients = [some for some in split if any(context.encoder.encode(record) for record in some)] or split
        gains = torch.stack([self.gains(context, records) for records in clients])
        context.examples_scored = sum(map(len, clients))
        masks = solve(gains, [self.k] * len(gains), self.penalty * median(gains.view(-1).tolist()))
        chosen = masks.any(0)
        context.block_scores.update(dict(enumerate(gains.mean(0).tolist())))
        context.notes.append(
            f"{int(chosen.sum())} of {len(blocks)} blocks train: the union of {self.k} for each of {len(gains)} clients."
        )
        return Selection.of(model, [name for block in blocks if chosen[block.index] for name in block.parameters])

    def split(self, records: Sequence[Record]) -> list[list[Record]]:
        """Return the clients' records."""
        sources: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            sources[record.source].append(record)
        if self.by == "source" or (self.by == "auto" and len(sources) > 1):
            return [first(sources[name], self.examples) for name in sorted(sources)]
        ordered = first(records, len(records))
        return [shard[: self.examples] for client in range(self.clients) if (shard := ordered[client :: self.clients])]

    def gains(self, context: Context, records: Sequence[Record]) -> Tensor:
        """Return one client's gain of each block, ``(blocks,)`` fp64."""
        weights = dict(context.base.model.named_parameters())
        blocks = context.base.anatomy.blocks
        found = sensitivities(context, [name for block in blocks for name in block.parameters], records)
        values = []
        for block in blocks:
            gain = sum(
                found[n].signal_to_noise if self.score == "signal_to_noise" else found[n].squares for n in block.parameters
            )
            if self.score == "relative":
                gain /= max(sum(float(weights[name].detach().float().square().sum()) for name in block.parameters), 1e-30)
            values.append(gain)
        return torch.tensor(values, dtype=torch.float64)
