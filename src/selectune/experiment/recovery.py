"""How much of what was planted in a pool a method of choosing examples keeps, without any training on its choice.

Knows: what a method chooses at several budgets of tokens, and the area under the curve of what is kept. Does not know: how a pool is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from selectune.examples.method import Array, ExampleMethod, Ranked, ranked
from selectune.examples.pool import Pool
from selectune.experiment.planting import GENERAL, Account


def choices(method: ExampleMethod, pool: Pool, budgets: Sequence[float]) -> dict[float, Array]:
    """Return what a method chooses at each budget, a share of the pool's trained tokens.

    A method that only scores records by themselves scores them once.

    Raises:
        UserError: what the method refuses.
    """
    at = {budget: method.model_copy(update={"fraction": budget, "count": None, "by": "tokens"}) for budget in budgets}
    if isinstance(method, Ranked) and type(method).choose is Ranked.choose and type(method).select is ExampleMethod.select:
        decided = next(iter(method.score(pool).values()))
        order = ranked(pool, decided, method.keep == "highest")
        return {budget: own.fill(pool, order) for budget, own in at.items()}
    return {budget: own.select(pool).places for budget, own in at.items()}


def recovery(places: Mapping[float, Array], pool: Pool, account: Account) -> dict[str, dict[str, list[float] | float]]:
    """Return, for each planted kind, the shares kept at each budget and the area under them.

    Args:
        places: budget -> chosen places.

    Returns:
        Kind -> ``kept`` (a share for each budget, in rising order) and ``area``: of the curve of the share kept over the share of plain general
        records kept, from none to all. 0.5 is a choice that does not tell the two apart (1/3 for duplicates, which need both copies); 0 is
        one that takes every plain record first.
    """
    rising = sorted(places)
    shares = [account.kept(pool.keys[place] for place in places[budget].tolist()) for budget in rising]
    found: dict[str, dict[str, list[float] | float]] = {}
    for kind in account.sizes():
        if kind in shares[0] and kind != GENERAL:
            kept = [share[kind] for share in shares]
            found[kind] = {"kept": kept, "area": area([share[GENERAL] for share in shares], kept)}
    return found


def area(across: Sequence[float], up: Sequence[float]) -> float:
    """Return the area under straight lines from (0, 0) over the given points to (1, 1), by rising ``across``."""
    points = sorted([(0.0, 0.0), *zip(across, up, strict=True), (1.0, 1.0)])
    return float(np.sum([(right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in pairwise(points)]))
