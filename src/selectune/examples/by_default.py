"""Which records train where nobody says.

Knows: of what pools a choice is worth training on, as measured in benchmarks/results/examples_final.md. Does not know: how any method chooses.
"""

from __future__ import annotations

from typing import Any

LARGE = 500
"""Records of the smallest pool that was measured."""
NEAREST: dict[str, Any] = {"method": "nearest", "vectors": "base", "fraction": 0.15, "by": "tokens"}


def by_default(records: int, target_is_named: bool) -> str | dict[str, Any]:
    """Return the method for a pool of so many records: those nearest to the target in a large one, all where nothing says what is wanted.

    Development records that are held out of the pool itself say nothing: they are like all of it.
    """
    return NEAREST if target_is_named and records >= LARGE else "all"
