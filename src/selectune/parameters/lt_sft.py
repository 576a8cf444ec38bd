"""LT-SFT: the entries that full fine-tuning changes most train, from where they began.

A lottery ticket: everything is fine-tuned once to see what moves; the weights go back, and only what moved most trains. In the iterative
variant each round adds its share of the entries and goes back only to the round's own beginning.

Knows: the rounds and the pull towards the base. Everything is tried on copies. Does not know: how a copy trains (``factors/trial.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.parameters.factors.allocation import allocate
from selectune.parameters.factors.targets import targets
from selectune.parameters.factors.trial import trial
from selectune.parameters.factors.units import gathered, units
from selectune.parameters.method import Budgeted, Context
from selectune.parameters.selection import Part, Selection


class LTSFT(Budgeted):
    """The entries that changed most in a full fine-tuning of a copy."""

    name: ClassVar[str] = "lt_sft"
    family: ClassVar[str] = "elements"
    paper: ClassVar[str] = "Composable Sparse Fine-Tuning for Cross-Lingual Transfer, ACL 2022, arXiv 2110.07560"
    summary: ClassVar[str] = "A lottery ticket: the entries that full fine-tuning changes most, trained from where they began."
    departs: ClassVar[str] = (
        "Chosen from the matrices of the blocks; embeddings and norms stay frozen in the first phase too. The first phase is a number of "
        "steps instead of epochs. The pull acts in the trials alone, not in the run, where it is of the mean distance of what trains; after several "
        "rounds the run starts at the base. The run's rate is 1e-3 where none is named, twenty times the paper's: few entries want more."
    )

    density: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Share of the weights in ``targets`` that train."""
    steps: Annotated[int, Field(gt=0)] = 100
    """Of full fine-tuning, in each round."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Of the trial, falling to zero in a line."""
    l1: Annotated[float, Field(ge=0)] = 0.0
    """Pull towards the base: times the mean distance of the weights (the paper: 0.1 for languages)."""
    iterations: Annotated[int, Field(gt=0)] = 1
    """Rounds; each adds its share of the entries."""

    def select(self, context: Context) -> Selection:
        eligible = targets(context.base, self.targets)
        budget = self.budget(eligible)
        if budget < self.iterations:
            raise UserError(f"{budget:,} entries cannot be found in {self.iterations} rounds", field="parameters.iterations",
                            expected=f"at most {budget:,}")  # fmt: skip
        everything = Selection.of(context.base.model, [target.name for target in eligible])
        weights = dict(context.base.model.named_parameters())
        origin = {target.name: weights[target.name].detach().float() for target in eligible}
        present: dict[str, tuple[Part, Tensor]] = {}
        found = Selection({})
        for round_ in range(self.iterations):
            there = self._at(present)
            options: dict[str, Any] = {"steps": self.steps, "learning_rate": self.learning_rate, "prepare": there}
            moved = partial(self._moved, context, everything, origin, options)
            change = moved() if round_ else context.once(("lt_sft", self.steps, self.learning_rate, self.l1, self.targets), moved)
            for name, part in found.parts.items():
                part.put(change[name], torch.full_like(part.take(change[name]), float("-inf")))
            groups = units("element", eligible, change, context.base.anatomy.blocks)
            more = budget * (round_ + 1) // self.iterations - budget * round_ // self.iterations
            found |= gathered(list(zip(groups, allocate(groups, more), strict=True)))
            if round_ + 1 < self.iterations:
                second = trial(context, found, before_step=self._pull(origin, found), **options)
                present = {name: (part, second.trained[name].detach()) for name, part in found.parts.items()}
        return found

    def _moved(
        self, context: Context, everything: Selection, origin: dict[str, Tensor], options: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return by how much each entry moves when everything trains."""
        first = trial(context, everything, before_step=self._pull(origin, everything), **options)
        return {name: first.change(name).abs() for name in origin}

    def _pull(self, origin: dict[str, Tensor], selection: Selection) -> Callable[[int, dict[str, Tensor]], None] | None:
        """Add the gradient of l1 times the mean distance from the base to what trains."""
        if not self.l1:
            return None
        strength = self.l1 / selection.count()

        def add(step: int, trained: dict[str, Tensor]) -> None:
            for name, value in trained.items():
                if value.grad is not None:
                    value.grad.add_((value.detach() - selection.parts[name].take(origin[name])).sign(), alpha=strength)

        return add

    @staticmethod
    def _at(present: dict[str, Any]) -> Callable[[Any], None]:
        """Put a copy where the last round left it."""

        def put(model: Any) -> None:
            weights = dict(model.named_parameters())
            for name, (part, values) in present.items():
                part.put(weights[name].data, values)

        return put
