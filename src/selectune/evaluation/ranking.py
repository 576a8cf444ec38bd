"""Is a ranking of sources any good? What is lost by following it.

Knows: Regret@k and NDCG of a ranking against true transfer ("What to Pre-Train on? Efficient Intermediate Task Selection", EMNLP 2021, arXiv
2104.08247). Does not know: how anything was ranked, or how transfer was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from selectune.errors import UserError


def regret_at(k: int, ranking: Sequence[str], performance: Mapping[str, float]) -> float:
    """Return Regret@k: how far the best of the first k lies below the best of all, in per cent of the best.

    Args:
        ranking: names, the best first. performance: name -> score at the target after that source, positive, higher is better.

    Raises:
        UserError: a source was not measured, k is below 1, or no score is positive (a loss, for instance).
    """
    _check(ranking, performance)
    best = max(performance.values())
    if k < 1 or best <= 0:
        raise UserError(f"Regret@{k} of a best score of {best:g} says nothing", expected="k of at least 1 and positive scores")
    return 100 * (best - max(performance[name] for name in ranking[:k])) / best


def ndcg(ranking: Sequence[str], gains: Mapping[str, float], k: int | None = None) -> float:
    """Return the normalised discounted cumulative gain: 1 for the order of the gains themselves.

    Args:
        gains: name -> what the source brought; one that did harm counts as nothing. k: of the first k alone.

    Returns:
        From 0 to 1; not a number where no source brought anything.

    Raises:
        UserError: a source was not measured.
    """
    _check(ranking, gains)
    useful = {name: max(gain, 0.0) for name, gain in gains.items()}

    def discounted(names: Sequence[str]) -> float:
        return sum(useful[name] / math.log2(place + 2) for place, name in enumerate(names[:k]))

    ideal = discounted(sorted(useful, key=lambda name: -useful[name]))
    return discounted(ranking) / ideal if ideal else math.nan


def _check(ranking: Sequence[str], measured: Mapping[str, float]) -> None:
    missing = [name for name in ranking if name not in measured]
    if missing or len(set(ranking)) < len(measured):
        raise UserError(
            f"ranked are {', '.join(ranking)}, measured {', '.join(measured)}", expected="the same sources, each once"
        )
