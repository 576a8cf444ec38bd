"""After the training, the tensors that it moved most are tuned on a few general and own records together; the rest stays as it is.

Knows: which tensors those are, and how they are tuned. Does not know: how the model was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field

from selectune.errors import UserError
from selectune.merging.method import Finish
from selectune.parameters.factors.gradients import first
from selectune.parameters.factors.trial import trial
from selectune.parameters.forgetting_prioritised import movement, that_fit
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.data import Record
    from selectune.parameters.method import Context


def repair(
    context: Context,
    model: Any,
    selection: Selection,
    buffer: Sequence[Record] = (),
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


class Repair(Finish):
    """What moved most is tuned on old and new together."""

    name: ClassVar[str] = "repair"
    paper: ClassVar[str] = "Does Continual Learning Equally Forget All Parameters?, ICML 2023, arXiv 2304.04158"
    summary: ClassVar[str] = "The tensors that training moved most are tuned on a few general and own records together (FPF)."
    departs: ClassVar[str] = (
        "Written from the paper's abstract and a summary. The movement is from the base to the specialist, one change of task; tensors of the "
        "blocks, and no others, are taken while they fit a share of the weights. The general records are the conversations that are built in (64)."
    )

    density: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the weights inside the blocks that is tuned at most."""
    steps: Annotated[int, Field(gt=0)] = 150
    """Of the repair."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Of the repair, falling to zero."""

    def finish(self, model: Any, context: Context) -> dict[str, Any]:
        anatomy = context.base.anatomy
        names = [name for block in anatomy.blocks for name in block.parameters]
        before, after = (dict(one.named_parameters()) for one in (context.base.model, model))
        moved = movement(before, after, {name: [name] for name in names})
        budget = int(self.density * sum(anatomy.sizes[name] for name in names))
        if not any(moved.values()):
            raise UserError("the training moved nothing in the blocks, so there is nothing to repair", field="finish",
                            expected="another finish, or weights in the blocks")  # fmt: skip
        chosen = that_fit({name: value for name, value in moved.items() if value > 0}, anatomy.sizes, budget)
        if not chosen:
            raise UserError("no tensor that the training moved is small enough for this share", field="finish.density",
                            expected="a larger density")  # fmt: skip
        mended = repair(context, model, Selection.of(model, chosen), steps=self.steps, learning_rate=self.learning_rate)
        with torch.no_grad():
            for name, value in mended.named_parameters():
                after[name].copy_(value)
        return {"tensors tuned": len(chosen), "weights tuned": sum(anatomy.sizes[name] for name in chosen), "steps": self.steps}
