"""The tensors that move most from task to task.

Knows: a tensor's sensitivity, and the choice of the most sensitive ones. Does not know: the repair that tunes only these after a training
(``merging/repair.py``), or the bursts of it in between (``training/policies/bursts.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.parameters.factors.gradients import first
from selectune.parameters.factors.sensitivity import Sensitivity, sensitivities
from selectune.parameters.factors.trial import trial
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection


def movement(before: Mapping[str, Tensor], after: Mapping[str, Tensor], groups: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """Return each group's sensitivity: the mean over its entries of |after - before|, 0 for a group that did not move."""
    found = {}
    for group, names in groups.items():
        members = list(names)
        total = sum(float((after[name].double() - before[name].double()).abs().sum()) for name in members)
        found[group] = total / max(sum(before[name].numel() for name in members), 1)
    return found


def that_fit(scores: Mapping[str, float], sizes: Mapping[str, int], budget: int) -> list[str]:
    """Return tensors from the highest score down, each that fits what is left of a budget of entries; ties in the given order."""
    chosen = []
    for name in sorted(scores, key=lambda name: -scores[name]):
        if sizes[name] <= budget:
            chosen.append(name)
            budget -= sizes[name]
    return chosen


def mean_absolute(found: Sensitivity) -> float:
    """Return the mean |gradient| of a pass: neither more records nor longer ones make it larger."""
    return found.absolute / max(found.passes, 1)


class ForgettingPrioritised(ParameterMethod):
    """The tensors with the highest sensitivity to a change of task."""

    name: ClassVar[str] = "forgetting_prioritised"
    family: ClassVar[str] = "blocks"
    paper: ClassVar[str] = "Does Continual Learning Equally Forget All Parameters?, ICML 2023, arXiv 2304.04158"
    summary: ClassVar[str] = "The tensors most sensitive to a change of task (FPF), few enough for bursts of repair."
    departs: ClassVar[str] = (
        "Written from the paper's abstract and a summary. Its list of layers is of vision networks with batch norms and is not used; sensitivity "
        "is measured on the base at hand. By gradients it is what the training records ask for more than general conversations do, in place of what "
        "moves between tasks more than within one. Tensors of the blocks, and no others, are taken while they fit a share of the weights, since "
        "the paper's threshold is not known."
    )

    measure: Literal["gradient", "movement"] = "gradient"
    """``gradient``: mean absolute gradient of a pass of training records, less that of a pass of general conversations;
    ``movement``: mean absolute change in a short training by plain gradient descent."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the weights inside the blocks that may train at most."""
    examples: Annotated[int, Field(gt=0)] = 64
    """Training records, the first by hash of their content."""
    steps: Annotated[int, Field(gt=0)] = 50
    """Of the short training, for ``movement``."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    """Of the short training; gradient descent, since Adam moves every weight alike."""

    def select(self, context: Context) -> Selection:
        model, anatomy = context.base.model, context.base.anatomy
        names = [name for block in anatomy.blocks for name in block.parameters]
        budget = int(self.density * sum(anatomy.sizes[name] for name in names))
        scores = self.scores(context, names)
        chosen = that_fit(scores, anatomy.sizes, budget)
        if not chosen:
            raise UserError("no tensor is small enough for this share", field="parameters.density", expected="a larger density")
        for block in anatomy.blocks:
            context.block_scores[block.index] = sum(scores[name] for name in block.parameters)
        return Selection.of(model, chosen)

    def scores(self, context: Context, names: Sequence[str]) -> dict[str, float]:
        """Return each tensor's sensitivity."""
        records = first(context.train, self.examples)
        if self.measure == "gradient":
            task, general = (sensitivities(context, names, some) for some in (records, first(context.general, self.examples)))
            return {name: mean_absolute(task[name]) - mean_absolute(general[name]) for name in names}
        context.examples_scored = len(records)
        done = trial(context, Selection.of(context.base.model, names), records=records, steps=self.steps,
                     learning_rate=self.learning_rate, optimiser="sgd")  # fmt: skip
        return movement(
            done.start, {name: value.detach() for name, value in done.trained.items()}, {name: [name] for name in names}
        )
