"""The tensors that move most from task to task, and a repair that tunes only these, on a few records of old and new.

Knows: a tensor's sensitivity, the choice of the most sensitive ones, and the repair of a trained model. Does not know: how the model was
trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.parameters.factors.gradients import first
from selectune.parameters.factors.sensitivity import Sensitivity, sensitivities
from selectune.parameters.factors.trial import trial
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.data import Record


def movement(before: Mapping[str, Tensor], after: Mapping[str, Tensor], groups: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """Return each group's sensitivity: the mean over its entries of |after - before|, 0 for a group that did not move."""
    found = {}
    for group, names in groups.items():
        members = list(names)
        total = sum(float((after[name].double() - before[name].double()).abs().sum()) for name in members)
        found[group] = total / max(sum(before[name].numel() for name in members), 1)
    return found


def repair(
    context: Context,
    model: Any,
    selection: Selection,
    buffer: Sequence[Record],
    *,
    steps: int = 150,
    learning_rate: float = 1e-4,
    seed: int = 0,
) -> Any:
    """Return a copy of a trained model in which the selection was tuned on a buffer of general and domain records; the rest is as it was.

    ``buffer`` left empty is filled with as many training records as there are general conversations, and these.
    """
    general = context.general
    records = list(buffer) or [*first(context.train, len(general)), *general]
    of_model = replace(context, base=replace(context.base, model=model))
    return trial(of_model, selection, records=records, steps=steps, learning_rate=learning_rate, seed=seed).model


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
        "moves between tasks more than within one. Tensors are taken while they fit a share of the weights, since the paper's threshold is not known."
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
        scores, chosen = self.scores(context, names), []
        for name in sorted(names, key=lambda name: (-scores[name], names.index(name))):
            if anatomy.sizes[name] <= budget:
                chosen.append(name)
                budget -= anatomy.sizes[name]
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
