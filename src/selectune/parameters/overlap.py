"""How much two selections have in common.

Knows: exact counts by parameter, Jaccard index, the share of each, and what chance would give. Does not know: what chose them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from selectune.errors import UserError
from selectune.parameters.selection import Selection


@dataclass(frozen=True)
class Overlap:
    """Counts of entries of two selections."""

    one: int
    other: int
    both: int
    size: int
    """Entries there are to choose from."""

    @property
    def union(self) -> int:
        return self.one + self.other - self.both

    @property
    def jaccard(self) -> float:
        """Common entries as a share of all that either has; 0 where neither has any."""
        return self.both / self.union if self.union else 0.0

    @property
    def share_of_one(self) -> float:
        return self.both / self.one if self.one else 0.0

    @property
    def share_of_other(self) -> float:
        return self.both / self.other if self.other else 0.0

    @property
    def by_chance(self) -> float:
        """Common entries to be expected of two random choices of these sizes."""
        return self.one * self.other / self.size if self.size else 0.0


def overlap(one: Selection, other: Selection) -> dict[str, Overlap]:
    """Compare two selections by parameter, over all parameters that either touches.

    Raises:
        UserError: a parameter has another shape in the other: they belong to different models.
    """
    found = {}
    for name in sorted(one.parts.keys() | other.parts.keys()):
        left, right = one.parts.get(name), other.parts.get(name)
        shape = (left or right).shape  # type: ignore[union-attr]
        if left and right and left.shape != right.shape:
            raise UserError(f"'{name}' is {left.shape} in one selection and {right.shape} in the other",
                            expected="two selections of one model")  # fmt: skip
        both = Selection({name: left}) & Selection({name: right}) if left and right else Selection({})
        found[name] = Overlap(left.count() if left else 0, right.count() if right else 0, both.count(), math.prod(shape))
    return found


def total(overlaps: Iterable[Overlap]) -> Overlap:
    """Add overlaps of several parameters up."""
    each = list(overlaps)
    return Overlap(*(sum(getattr(one, key) for one in each) for key in ("one", "other", "both", "size")))
