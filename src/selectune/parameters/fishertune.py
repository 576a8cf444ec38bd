"""FisherTune: entries whose robust Fisher score is near their matrix's highest; the bar is lowered as time goes on.

The score adds to an entry's Fisher information what a change of domain would do to it. At time 0 only entries near the top train; a policy
that chooses anew lets the number grow.

Knows: the threshold of a time. Does not know: the score (``factors/shift.py``), or what time it is.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field

from selectune.parameters.factors.scores import Settings, scores_of
from selectune.parameters.factors.targets import targets
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Part, Selection


class FisherTune(ParameterMethod):
    """Entries whose score, divided by the highest of their matrix, exceeds a threshold that falls with time."""

    name: ClassVar[str] = "fishertune"
    family: ClassVar[str] = "elements"
    paper: ClassVar[str] = "FisherTune: Fisher-Guided Robust Tuning of Vision Foundation Models, CVPR 2025, arXiv 2503.17940"
    summary: ClassVar[str] = (
        "Entries with high Fisher information, here or where the domain changes; the threshold falls with time."
    )
    departs: ClassVar[str] = (
        "Another domain is stood for by prompts with exchanged tokens (the paper: images in another style). The change of the Fisher "
        "information is brought to its mean per matrix before the two are added, with its lowest tenth as the floor of the quotient. The "
        "variational estimate of the Fisher information is left out. Constants are those of a third party's port."
    )

    score: str = "domain_robust_fisher"
    """How an entry is scored."""
    highest: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Threshold at time 0."""
    lowest: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Threshold that it falls to."""
    time: Annotated[float, Field(ge=0)] = 0.0
    """How long training has gone on, in units in which the threshold's excess falls to 1/e."""
    shift: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of a prompt's tokens that are exchanged; the more, the less what changes then counts."""
    examples: Annotated[int, Field(gt=0)] = 64
    """Training records to score on, the first by hash of their content."""
    targets: str = "linear"
    """Which weights may be chosen from, as in ``scored``."""

    def threshold(self) -> float:
        """Return the threshold of this time."""
        return self.lowest + (self.highest - self.lowest) * math.exp(-self.time)

    def select(self, context: Context) -> Selection:
        if self.time == 0:
            context.notes.append("The threshold is at its highest; it falls with the policy `refresh`, or as far as `time` says.")
        eligible = targets(context.base, self.targets)
        scores = scores_of(self.score, context, eligible, Settings(examples=self.examples, shift=self.shift))
        parts = {}
        for target in eligible:
            found = scores.pop(target.name)
            index = (found / found.max() > self.threshold()).view(-1).nonzero().squeeze(-1)
            if len(index):
                parts[target.name] = Part(target.shape, "elements", index)
        return Selection(dict(sorted(parts.items())))
