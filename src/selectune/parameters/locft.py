"""One well-chosen place for facts: a matrix of one block, found by trying, and trained breadth first.

Knows: the places that are tried and how the best is found. Does not know: how a run trains; what it says of that is a note.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from selectune.errors import UserError
from selectune.parameters.factors.roles import weights_by_role
from selectune.parameters.method import Context
from selectune.parameters.searched import Searched
from selectune.parameters.selection import Selection

Place = tuple[int, str]


class LocFT(Searched):
    """The matrix whose short training gains most."""

    name: ClassVar[str] = "locft"
    family: ClassVar[str] = "blocks"
    usual_rate: ClassVar[float | None] = 5e-4
    paper: ClassVar[str] = "Fine-tuning Done Right in Model Editing, ICLR 2026, arXiv 2509.22072"
    summary: ClassVar[str] = "One matrix of one block for new facts, found by trying places (LocFT-BF)."
    departs: ClassVar[str] = (
        "A place is worth what it gains on records held out, less what it costs on general conversations; the paper measures edits. The "
        "search is a coarse scan by default; a whole block that is chosen trains at the rate of a single matrix, ten times that of its "
        "trial. Passing over batches that are known, and the early end, are the policy `breadth_first`."
    )

    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Of a trial, falling to zero (the paper: of a single matrix; a tenth of it for a whole block)."""
    retention: Annotated[float, Field(ge=0)] = 1.0
    """How much a rise of the loss on general conversations counts against the gain."""
    modules: str = "down"
    """Roles that are tried, divided by ``/``; ``block`` for a whole one. All: ``query/key/value/attention_output/up/gate/down/block``."""
    every: Annotated[int, Field(gt=0)] = 3
    """Only each so-manieth block is tried."""
    block: Annotated[int, Field(ge=0)] | None = None
    """A block that is known to be good, counted from 0: the only one tried."""
    places: Annotated[int, Field(gt=0)] = 1
    """How many of the best places train."""

    def select(self, context: Context) -> Selection:
        count = len(context.base.anatomy.blocks)
        if self.block is not None and self.block >= count:
            raise UserError(
                f"block {self.block} is asked for and the base has {count}",
                field="parameters.block",
                expected=f"0 to {count - 1}",
            )
        numbers = list(range(min(self.every, count) - 1, count, self.every)) if self.block is None else [self.block]
        candidates = [(number, role.strip()) for number in numbers for role in self.modules.split("/")]
        selections = {place: self.at(context, place) for place in candidates}
        context.notes.append(
            "Train breadth first: many epochs (25 in the paper), large batches, and the policy `breadth_first`, which ends when all is known."
        )
        if len(candidates) <= self.places:
            return self._joined(list(selections.values()))
        gains = {
            role: self._at_rate_of(role).gains(context)
            for role in {"block" if role == "block" else "matrix" for _, role in candidates}
        }
        with self.table(
            context, lambda place: gains["block" if place[1] == "block" else "matrix"](selections[place]), len(candidates)
        ) as worth:
            for place in candidates[: self.trials]:
                worth(place)
        order = sorted(worth.values, key=lambda place: -worth.values[place])
        for (number, _), value in worth.values.items():
            context.block_scores[number] = max(value, context.block_scores.get(number, value))
        return self._joined([selections[place] for place in order[: self.places]])

    def _at_rate_of(self, role: str) -> LocFT:
        """Return this search at the rate of its trials: a whole block's is a tenth of a matrix's."""
        return self if role != "block" else self.model_copy(update={"learning_rate": self.learning_rate / 10})

    def at(self, context: Context, place: Place) -> Selection:
        """Return the weights of one place."""
        number, role = place
        if role == "block":
            return Selection.of(context.base.model, context.base.anatomy.blocks[number].parameters)
        return weights_by_role(context.base, role, biases=False, blocks=[number])

    @staticmethod
    def _joined(selections: list[Selection]) -> Selection:
        whole = selections[0]
        for one in selections[1:]:
            whole = whole | one
        return whole
