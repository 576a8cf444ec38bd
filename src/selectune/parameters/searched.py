"""What methods have in common that try selections by short trainings.

Knows: the settings of a trial. Does not know: which selections are tried.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from selectune.parameters.factors.search import Table, Trials
from selectune.parameters.method import Context, ParameterMethod


class Searched(ParameterMethod, ABC):
    """A method that measures what selections gain."""

    steps: Annotated[int, Field(gt=0)] = 50
    """Optimiser steps of a trial, two packed sequences each."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Of a trial, falling to zero."""
    examples: Annotated[int, Field(gt=1)] = 256
    """Training records that trials use, the first by hash of their content."""
    retention: Annotated[float, Field(ge=0)] = 0.0
    """How much a rise of the loss on general conversations counts against the gain."""
    trials: Annotated[int, Field(gt=0)] | None = None
    """Selections that may be tried at most; then the best so far is taken."""

    def gains(self, context: Context, folds: int = 1) -> Trials:
        """Return what tells a selection's worth."""
        return Trials(context, self.steps, self.learning_rate, self.examples, folds, retention=self.retention)

    def table(self, context: Context, measure: Callable[[Any], float], expected: int | None = None) -> Table[Any]:
        """Return a table of candidates within the budget of trials."""
        return Table(measure, most=self.trials, expected=expected, quiet=context.quiet)
