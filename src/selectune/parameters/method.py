"""What every method of this axis has in common.

Knows: what a method may ask for (``Context``), what it returns (``Selection``), and what a budget of entries means.
Does not know: any method.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from selectune.catalogue import Method
from selectune.errors import UserError
from selectune.meter import Meter
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.data import Encoder, Record
    from selectune.models import Base
    from selectune.parameters.factors.targets import Target


@dataclass(frozen=True)
class Kept:
    """Scores that a choice measured."""

    scores: dict[str, Tensor]
    spent: dict[str, Any]
    """As a meter counts it."""
    drawn: Tensor
    """State of the generator afterwards."""
    examples: int


@dataclass
class Context:
    """What a method may ask for."""

    base: Base
    encoder: Encoder | Any
    train: list[Record]
    dev: list[Record]
    generator: torch.Generator
    meter: Meter
    bfloat16: bool = False
    """Compute in bf16 by autocast; whatever is added up is fp32."""
    quiet: bool = False
    block_scores: dict[int, float] = field(default_factory=dict)
    """Scores of blocks, left here by a method that has them."""
    examples_scored: int = 0
    notes: list[str] = field(default_factory=list)
    """What a person should know of the choice, a sentence each."""

    kept: dict[Hashable, Kept] | None = None
    """What other choices on this base measured; left out: this one is alone."""

    def once(self, what: Hashable, measure: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return scores as ``measure`` gives them, or gave them to another choice with the same records, draws and ``what``.

        What they cost is counted as if they were measured here. The tensors belong to all who ask: nobody may change them in place.
        """
        if self.kept is None:
            return measure()
        key = (what, tuple(record.key for record in self.train), self.generator.get_state().numpy().tobytes())
        if key in self.kept:
            found = self.kept[key]
            self.meter.count(**found.spent)
            self.generator.set_state(found.drawn)
        else:
            before, begin = self.meter.cost.model_copy(), time.perf_counter()
            scores = measure()
            spent = self.meter.since(before) | {"seconds": time.perf_counter() - begin}
            found = self.kept[key] = Kept(scores, spent, self.generator.get_state(), self.examples_scored)
        self.examples_scored = max(self.examples_scored, found.examples)
        return dict(found.scores)

    @cached_property
    def general(self) -> list[Record]:
        """General conversations like those on which nothing should be lost, and none of them (built in)."""
        from selectune.evaluation.probe import general_conversations

        return general_conversations()


class ParameterMethod(Method, ABC):
    """An answer to: which weights may change?"""

    axis: ClassVar[str] = "parameters"
    usual_form: ClassVar[str] = "full"
    """The form in which the choice changes where a recipe names none: in place, which heeds every choice."""

    usual_rate: ClassVar[float | None] = None
    """The peak learning rate in place where a recipe names none; left out: that of the form. Few entries want larger ones than all."""

    def peak_rate(self, form: Any) -> float:
        """Return the peak learning rate where a recipe names none."""
        return self.usual_rate if self.usual_rate is not None and form.name == "full" else float(form.learning_rate_default)

    @abstractmethod
    def select(self, context: Context) -> Selection:
        """Choose entries of the base's weights."""


class Budgeted(ParameterMethod, ABC):
    """A method that fills a budget of entries."""

    usual_rate: ClassVar[float | None] = 1e-3
    exact: ClassVar[bool] = True
    """Whether it fills the budget as far as its units fit; otherwise its own rule decides, and says so in ``departs`` or ``summary``."""

    density: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the weights in ``targets`` that train."""
    entries: Annotated[int, Field(gt=0)] | None = None
    """How many entries train, instead of ``density``."""
    targets: str = "linear"
    """Which weights may be chosen from: ``linear`` (all matrices of the blocks), ``attention``, ``mlp``, or roles joined by ``+``, such
    as ``query+value`` or ``gate+up+down``."""

    def budget(self, targets: Sequence[Target]) -> int:
        """Return how many entries may be chosen.

        Raises:
            UserError: more than there is, or fewer than one.
        """
        there = sum(target.count for target in targets)
        wanted = self.entries if self.entries is not None else round(self.density * there)
        if wanted > there:
            raise UserError(f"{wanted:,} entries are asked for and {self.targets} has {there:,}", field="parameters.entries",
                            expected=f"at most {there:,}")  # fmt: skip
        if wanted < 1:
            raise UserError(f"a density of {self.density:g} of {there:,} weights is less than one entry", field="parameters.density",
                            expected=f"at least {1 / there:.1g}")  # fmt: skip
        return wanted
