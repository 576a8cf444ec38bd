"""SPT: each matrix trains a few entries, or gets a low-rank adapter where many of its entries are sensitive; vectors likewise.

Entries are ranked by sensitivity anywhere. A matrix that holds so many of the best that an adapter would be the better use of parameters gets
the adapter instead; how many of the best are looked at is swept, and the sweep's number is kept whose total is nearest to the budget.

Knows: the decision for each matrix and vector, and the sweep. A matrix that is to have an adapter is selected whole, and the form
``sparse_and_low_rank`` attaches one of the same rank. Does not know: how either trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.parameters.factors.allocation import best
from selectune.parameters.factors.gradients import gather
from selectune.parameters.factors.targets import Target, targets
from selectune.parameters.method import Budgeted, Context
from selectune.parameters.selection import Part, Selection

_POINTS = 160  # of the sweep, up to four times the budget


@dataclass(frozen=True)
class Decision:
    """What is made of each tensor for some number of best entries."""

    whole: Tensor
    """``(tensors,)`` bool: adapter beside the matrix, or the whole vector."""
    trained: int
    """Parameters that train."""


def decide(counts: Tensor, structured: Tensor, thresholds: Tensor) -> Decision:
    """Decide for each tensor between its picked entries and the structured form.

    Args:
        counts: ``(tensors,)`` picked entries. structured: parameters of the structured form. thresholds: counts from which it is taken.
    """
    whole = (counts > 0) & (counts >= thresholds)
    return Decision(whole, int(torch.where(whole, structured, counts).sum()))


class SPT(Budgeted):
    """The most sensitive entries; matrices with many of them are selected whole, for a low-rank adapter."""

    name: ClassVar[str] = "spt"
    family: ClassVar[str] = "elements"
    usual_form: ClassVar[str] = "sparse_and_low_rank"
    paper: ClassVar[str] = "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning, ICCV 2023, arXiv 2303.08566"
    summary: ClassVar[str] = (
        "The most sensitive entries; a matrix with many of them is selected whole, to get a low-rank adapter (form `sparse_and_low_rank`)."
    )
    departs: ClassVar[str] = (
        "A batch is a packed sequence of records. The budget counts what trains with the form `sparse_and_low_rank` of the same rank; no "
        "head trains. The sweep goes to four times the budget in 160 steps. Stacks of experts are left out."
    )
    exact: ClassVar[bool] = False

    density: Annotated[float, Field(gt=0, le=1)] = 0.005
    """Share of the weights in ``targets`` that train, adapters by their own size."""
    rank: Annotated[int, Field(gt=0)] = 8
    """Of the adapter, as in the form."""
    alpha: Annotated[float, Field(gt=0)] = 10.0
    """A matrix gets the adapter from 1/alpha of the adapter's parameters on."""
    beta: Annotated[float, Field(gt=0)] = 5.0
    """A vector trains whole from 1/beta of its entries on."""
    examples: Annotated[int, Field(gt=0)] = 128
    """Training records to score on, the first by hash of their content."""

    def select(self, context: Context) -> Selection:
        budget = self.budget(targets(context.base, self.targets))
        eligible = self.tensors(context)
        if all(len(target.shape) != 2 for target in eligible):
            raise UserError(f"'{self.targets}' of this base are stacks of experts, and no matrices are left", field="parameters.targets",
                            expected="attention, or linear")  # fmt: skip
        scores = gather(context, [t.name for t in eligible], ["squared"], examples=self.examples, packed=True)["squared"]
        sizes = torch.tensor([target.count for target in eligible])
        flat = torch.cat([scores.pop(target.name).view(-1) for target in eligible])
        places = best(flat, min(4 * budget, len(flat)))
        places = places[flat[places].argsort(descending=True, stable=True)].cpu()
        owner = torch.bucketize(places, sizes.cumsum(0), right=True)
        structured = torch.tensor([self.rank * sum(t.shape) if len(t.shape) == 2 else t.count for t in eligible])
        limits = torch.tensor([self.alpha if len(target.shape) == 2 else self.beta for target in eligible])
        tried = []
        for point in range(1, _POINTS + 1):
            count = min(len(places), max(1, round(len(places) * point / _POINTS)))
            decision = decide(torch.bincount(owner[:count], minlength=len(eligible)), structured, structured / limits)
            tried.append((abs(decision.trained - budget), count, decision))
        _, count, decision = min(tried, key=lambda one: one[:2])
        starts = sizes.cumsum(0) - sizes
        parts = {}
        for number in owner[:count].unique().tolist():
            target = eligible[number]
            own = places[:count][owner[:count] == number] - starts[number]
            parts[target.name] = Part(target.shape) if decision.whole[number] else Part(target.shape, "elements", own)
        adapters = int(sum(len(eligible[number].shape) == 2 for number in decision.whole.nonzero().squeeze(-1).tolist()))
        context.notes.append(
            f"{adapters} of {sum(len(t.shape) == 2 for t in eligible)} matrices get an adapter of rank {self.rank}; with it "
            f"{decision.trained:,} parameters train."
        )
        return Selection(dict(sorted(parts.items())))

    def tensors(self, context: Context) -> list[Target]:
        """Return the matrices in ``targets``, and the vectors of the blocks."""
        matrices = [target for target in targets(context.base, self.targets) if len(target.shape) == 2]
        weights = dict(context.base.model.named_parameters())
        vectors = [
            Target(name, tuple(weights[name].shape), "vector", block.index)
            for block in context.base.anatomy.blocks
            for name in block.parameters
            if weights[name].dim() == 1
        ]
        return matrices + vectors
