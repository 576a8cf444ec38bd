"""What policies that train only a part at a time have in common.

Knows: how the rest is left out of a step (no gradient, so no update, no momentum, no decay), for how long, and that the optimiser's state of
what leaves may be dropped. Does not know: which part it is, or why.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from selectune.errors import UserError
from selectune.training.policies.policy import Policy, Stage


class Sampled(Policy, ABC):
    """Trains some of what may train, drawn anew from time to time."""

    @abstractmethod
    def due(self, stage: Stage) -> bool:
        """Whether to draw anew before this step."""

    @abstractmethod
    def draw(self, stage: Stage) -> set[str]:
        """Return the names of what trains from now on."""

    def forgets(self) -> bool:
        """Whether the optimiser's state of what leaves is dropped."""
        return True

    def before_step(self, stage: Stage) -> None:
        if "active" not in stage.numbers or self.due(stage):
            active = self.draw(stage)
            if not active:
                raise UserError(f"'{self.name}' drew nothing that may train", field="policy", expected="a choice of more blocks or matrices",
                                mend="choose more weights, or draw a larger share")  # fmt: skip
            if self.forgets():
                stage.forget(set(stage.numbers.get("active", [])) - active)
            stage.numbers["active"] = sorted(active)
        stage.train_only(set(stage.numbers["active"]))

    def gradients(self, stage: Stage) -> None:
        stage.drop(set(stage.parameters) - set(stage.numbers["active"]))

    def after_step(self, stage: Stage) -> None:
        stage.train_only()


def by_block(stage: Stage) -> dict[int | None, set[str]]:
    """Return the names of what trains by block; under None what lies outside of blocks."""
    found: dict[int | None, set[str]] = {}
    for name in stage.parameters:
        found.setdefault(stage.block(name), set()).add(name)
    return found
