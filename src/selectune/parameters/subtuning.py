"""A few blocks found by trying: each alone (the profile), then the best beside the ones already found.

Knows: what the candidates are and how the search goes on and ends. Does not know: what a trial is (``factors/search.py``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from selectune.parameters.factors.allocation import best
from selectune.parameters.factors.gradients import first
from selectune.parameters.factors.roles import weights_by_role
from selectune.parameters.factors.search import Code, Exhausted, Table, Trials, greedy
from selectune.parameters.factors.sensitivity import sensitivities
from selectune.parameters.method import Context
from selectune.parameters.searched import Searched
from selectune.parameters.selection import Selection


class SubTuning(Searched):
    """The set that greedy search finds."""

    name: ClassVar[str] = "subtuning"
    family: ClassVar[str] = "blocks"
    paper: ClassVar[str] = "Less is More: Selective Layer Finetuning with SubTuning, 2023, arXiv 2302.06354"
    summary: ClassVar[str] = "A few blocks by greedy search: each step the one whose short training gains most, cross-validated."
    departs: ClassVar[str] = (
        "There is no new head, and the base's stays frozen. The measure is held-out loss instead of accuracy. Only the blocks with the largest "
        "gradients are tried, and at most four are taken, to make the search affordable; `candidates` and `most` at the number of blocks are "
        "the paper's."
    )

    unit: Literal["block", "half"] = "block"
    """Whole blocks, or the attention and the MLP of each by themselves."""
    candidates: Annotated[int, Field(gt=0)] = 12
    """Units that are tried: those with the largest gradients."""
    most: Annotated[int, Field(gt=0)] = 4
    """Units in the set at most, when adding."""
    folds: Annotated[int, Field(gt=0)] = 2
    """Of the cross-validation (the paper: 5); 1: measure on the development records."""
    slack: Annotated[float, Field(ge=0)] = 0.01
    """Nats: a step must gain more (rule ``gain``), or must not fall farther below the best (rule ``best``)."""
    rule: Literal["gain", "best"] = "best"
    """When the search ends: as in the paper's text (``gain``), or as in its code (``best``)."""
    direction: Literal["add", "remove", "auto"] = "add"
    """Start with nothing and add, start with all candidates and remove, or from whichever of the two is better."""

    def select(self, context: Context) -> Selection:
        selections = self.units(context)
        tried = self.promising(context, selections)
        gains = self.gains(context, self.folds)
        with self.table(context, self._measure(gains, selections), len(tried) * min(self.most, len(tried))) as worth:
            backward = self.direction == "remove" or (self.direction == "auto" and self._better_whole(worth, tried))
            chosen = greedy(tried, worth, backward=backward, slack=self.slack, rule=self.rule, most=self.most)
        self._note_profile(context, worth)
        if not chosen:
            chosen = max((code for code in worth.values if code), key=worth.values.__getitem__, default=(tried[0],))
            context.notes.append("No set gained in its short training; the one that lost least was taken.")
        return self._joined(selections, chosen)

    @staticmethod
    def _better_whole(worth: Table[Code], tried: list[int]) -> bool:
        """Whether all candidates are worth more than none, as far as trials reach."""
        try:
            return worth(tuple(tried)) > worth(())
        except Exhausted:
            return False

    def units(self, context: Context) -> list[Selection]:
        """Return what may be chosen as one."""
        base, blocks = context.base, context.base.anatomy.blocks
        if self.unit == "block":
            return [Selection.of(base.model, block.parameters) for block in blocks]
        return [weights_by_role(base, kind, blocks=[block.index]) for block in blocks for kind in ("attention", "mlp")]

    def promising(self, context: Context, selections: list[Selection]) -> list[int]:
        """Return the units with the largest gradients, by squared norm for each weight, sorted."""
        if self.candidates >= len(selections):
            return list(range(len(selections)))
        names = sorted({name for one in selections for name in one.names()})
        found = sensitivities(context, names, first(context.train, min(self.examples, 64)))
        scores = [sum(found[name].squares for name in one.names()) / one.count() for one in selections]
        return best(torch.tensor(scores, dtype=torch.float64), self.candidates).tolist()

    def _measure(self, gains: Trials, selections: list[Selection]):  # type: ignore[no-untyped-def]
        return lambda code: gains(self._joined(selections, code))

    def _note_profile(self, context: Context, worth: Table[Code]) -> None:
        """Leave what each unit gained alone, the better half of a block for the block."""
        each = 2 if self.unit == "half" else 1
        for code, value in worth.values.items():
            if len(code) == 1:
                block = code[0] // each
                context.block_scores[block] = max(value, context.block_scores.get(block, value))

    @staticmethod
    def _joined(selections: list[Selection], code: Code) -> Selection:
        return Selection({name: part for unit in code for name, part in selections[unit].parts.items()})
