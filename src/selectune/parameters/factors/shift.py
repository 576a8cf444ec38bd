"""A Fisher score that asks too what a change of domain would do to it.

Knows: how a prompt is disturbed so that it stands for another domain, and how the two Fisher diagonals make one score.
Does not know: what is done with a score.

Source: *FisherTune: Fisher-Guided Robust Tuning of Vision Foundation Models for Domain Generalized Segmentation*, CVPR 2025, arXiv 2503.17940.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selectune.parameters.factors.gradients import first, gather, rows_of
from selectune.parameters.factors.scores import Scores, Settings, score
from selectune.parameters.factors.targets import Target

if TYPE_CHECKING:
    from selectune.parameters.method import Context

_FLOOR = 0.1  # of a tensor's Fisher values above zero, what counts as none


@score
def domain_robust_fisher(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """F + exp(-shift) D, D = |F - F'| / (min(F, F') + floor), F' with disturbed prompts; per tensor, D is brought to F's mean."""
    names = [target.name for target in targets]
    plain = gather(context, names, ["squared"], examples=settings.examples, loss="sum")["squared"]
    disturb = Disturbed(context, settings.shift, settings.examples)
    other = gather(context, names, ["squared"], examples=settings.examples, loss="sum", alter=disturb)["squared"]
    return {name: robust(plain[name], other.pop(name), settings.shift) for name in names}


def robust(plain: Tensor, other: Tensor, shift: float) -> Tensor:
    """Return the score of one tensor from its two Fisher diagonals."""
    felt = plain[plain > 0]  # an expert that no token met, or a unit that is never on, has nothing but zeros
    floor = felt.kthvalue(max(1, int(_FLOOR * len(felt)))).values if len(felt) else torch.ones((), device=plain.device)
    change = (plain - other).abs() / (torch.minimum(plain, other) + floor)
    scale = plain.mean() / change.mean() if change.any() else 0.0
    return plain + math.exp(-shift) * scale * change


class Disturbed:
    """Exchanges a share of each prompt's tokens for others that the scored prompts hold; responses stay as they are."""

    def __init__(self, context: Context, share: float, examples: int) -> None:
        self.share, self.generator = share, context.generator
        rows = rows_of(context, first(context.train, examples))
        self.words = torch.cat([row["input_ids"][row["labels"] == -100] for row in rows])

    def __call__(self, row: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = row["input_ids"].clone()
        exchanged = (torch.rand(ids.shape, generator=self.generator) < self.share) & (row["labels"] == -100)
        drawn = torch.randint(len(self.words), (int(exchanged.sum()),), generator=self.generator)
        ids[exchanged] = self.words[drawn]
        return row | {"input_ids": ids}
