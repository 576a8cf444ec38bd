"""Does training on some sub-domains (or languages) help the others? Scores by how near what was tested lies to what was trained.

Knows: three classes of what is tested (trained, similar to it, distant), and how a score over a growing number of trained sub-domains is read ("How
Many Languages Make Good Multilingual Instruction Tuning?", COLING 2025, arXiv 2404.04850). Does not know: how anything was trained or scored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np

Exposure = Literal["trained", "similar", "distant"]


def exposure(trained: Collection[str], distance: Mapping[str, Mapping[str, float]]) -> dict[str, Exposure]:
    """Return the class of every tested sub-domain.

    Args:
        distance: tested -> each other sub-domain -> how far it is. Of those that were not trained the nearer half to any that was is ``similar`` (the
            middle one of an odd number too), the other half ``distant``; without any training all are ``distant``.
    """
    if not trained:
        return dict.fromkeys(distance, "distant")
    nearest = {name: min(far for other, far in row.items() if other in trained and other != name)
               for name, row in distance.items() if name not in trained}  # fmt: skip
    middle = float(np.median(list(nearest.values()))) if nearest else 0.0
    return {name: "trained" if name in trained else "similar" if nearest[name] <= middle else "distant" for name in distance}


def by_exposure(scores: Mapping[str, float], classes: Mapping[str, Exposure]) -> dict[Exposure, float]:
    """Return the mean score of each class that has a member."""
    found: dict[Exposure, list[float]] = {}
    for name, score in scores.items():
        found.setdefault(classes[name], []).append(score)
    return {one: float(np.mean(values)) for one, values in found.items()}


def best_number(curve: Sequence[float]) -> int:
    """Return how many sub-domains score best, counted from 1; the fewest of several."""
    return int(np.argmax(curve)) + 1


def rises(curve: Sequence[float], tolerance: float = 0.0) -> bool:
    """Whether more sub-domains never score less, within a tolerance."""
    return bool((np.diff(curve) >= -tolerance).all())
