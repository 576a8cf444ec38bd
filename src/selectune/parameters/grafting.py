"""Grafting as a choice: the entries whose fine-tuned values carry the skill train again, alone, from the base.

A copy is fine-tuned whole, the few entries are found that bring most of what it learnt, and these are the selection.

Knows: the trial. Does not know: how the entries are found (``merging/graft.py``), which also grafts their values without training.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from selectune.merging.delta import Delta
from selectune.merging.graft import graft
from selectune.parameters.factors.targets import targets
from selectune.parameters.factors.trial import trial
from selectune.parameters.method import Budgeted, Context
from selectune.parameters.selection import Selection


class Grafting(Budgeted):
    """The entries whose fine-tuned values, put into the base, bring back most of the skill."""

    name: ClassVar[str] = "grafting"
    family: ClassVar[str] = "elements"
    paper: ClassVar[str] = "Task-Specific Skill Localization in Fine-tuned Language Models, ICML 2023, arXiv 2302.06600"
    summary: ClassVar[str] = "The few entries whose fine-tuned values carry the skill, found in a fine-tuned copy."
    departs: ClassVar[str] = (
        "The found entries train again from the base; the paper grafts their fine-tuned values (selectune.merging.graft does). The rate of "
        "the mask's descent is set by its first gradient instead of to 1e7. Chosen from the matrices of the blocks. Entries that the learnt "
        "mask adds beyond the budget are left out, the least changed first, and entries that it lacks are filled up with the most changed. "
        "The mask of the least loss is kept, where the paper keeps the one of the best score. The run's rate is 1e-3 where none is named."
    )

    density: Annotated[float, Field(gt=0, le=1)] = 0.001
    """Share of the weights in ``targets`` that train, and of the base patch that the mask starts as (the paper: 1e-7 to 1e-4)."""
    steps: Annotated[int, Field(gt=0)] = 100
    """Of full fine-tuning of the copy."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Of it, falling to zero in a line."""
    rounds: Annotated[int, Field(ge=0)] = 10
    """Of learning the mask; 0: the entries that changed most."""
    mask_learning_rate: Annotated[float, Field(ge=0)] = 1.0
    """Of learning the mask, in units in which the first round moves the logit with the largest gradient by 1 (it has 10 to go)."""
    examples: Annotated[int, Field(gt=0)] = 64
    """Training records that the mask is learnt on, the first by hash of their content."""

    def select(self, context: Context) -> Selection:
        eligible = targets(context.base, self.targets)
        budget = self.budget(eligible)
        everything = Selection.of(context.base.model, [target.name for target in eligible])
        tuned = trial(context, everything, steps=self.steps, learning_rate=self.learning_rate)
        before, after = ({name: value.detach().cpu() for name, value in side.items()} for side in (tuned.start, tuned.trained))
        delta = Delta(context.base.spec, context.base.fingerprint, everything, before, after)
        return graft(context, delta, entries=budget, rounds=self.rounds, learning_rate=self.mask_learning_rate,
                     examples=self.examples, exact=True).selection  # fmt: skip
