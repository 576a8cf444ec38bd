"""Which records train where nobody says.

Knows: of what pools a choice is worth training on, as measured in benchmarks/results/examples_final.md. Does not know: how any method chooses.
"""

from __future__ import annotations

from typing import Any

LARGE = 500
"""Records of the smallest pool that was measured, about."""
TOWARD_TARGET: dict[str, Any] = {"method": "sift", "vectors": "base", "fraction": 0.15, "by": "tokens"}
"""Outside the band of random choices on mathematics and medicine at 5, 15 and 30 %, in it on labels of financial news, and better than the whole
pool over all three; by the base's own vectors, which need no second model."""


def by_default(records: int, target_is_named: bool) -> str | dict[str, Any]:
    """Return the method for a pool of so many records: what the target lacks of a large one, all where nothing says what is wanted.

    Development records that are held out of the pool itself say nothing: they are like all of it.
    """
    return TOWARD_TARGET if target_is_named and records >= LARGE else "all"
