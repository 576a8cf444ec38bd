"""Several scores at once: fronts that nothing dominates; and scores under a budget of tokens, or of a batch that passes.

Knows: Pareto fronts, the knapsack of records, and a choice batch by batch. Does not know: what is scored.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
EXACT = 4_000_000
"""Records times tokens up to which a knapsack is filled exactly."""


def pareto_fronts(columns: Array) -> Array:
    """Return each row's front, ``(rows,)`` int64: 0 where no row is at least as good in all columns and better in one; 1 without those; and so on.

    Rows are met from the best down and find their front by halving (efficient non-dominated sorting, Zhang and others 2015).

    Args:
        columns: ``(rows, criteria)``, higher is better.
    """
    fronts: list[list[int]] = []
    found = np.empty(len(columns), dtype=np.int64)
    for row in np.lexsort(-columns.T[::-1]).tolist():
        low, high = 0, len(fronts)
        while low < high:
            middle = (low + high) // 2
            rivals = columns[fronts[middle]]
            above = (rivals >= columns[row]).all(1) & (rivals > columns[row]).any(1)
            low, high = (middle + 1, high) if above.any() else (low, middle)
        if low == len(fronts):
            fronts.append([])
        fronts[low].append(row)
        found[row] = low
    return found


def knapsack_order(values: Array, tokens: Array, budget: int) -> Array:
    """Return the places of records in an order whose filling has a high total value: the highest, for few; else at least half of it.

    Many are taken by value per token, unless the most valuable one alone is worth more.

    Args:
        values: ``(n,)`` positive. tokens: ``(n,)`` whole numbers. budget: of tokens.
    """
    from selectune.parameters.factors.knapsack import knapsack

    density = np.argsort(-(values / np.maximum(tokens, 1)), kind="stable")
    if len(values) * budget <= EXACT:
        first = knapsack(values.tolist(), tokens.tolist(), budget)
    else:
        filled = density[np.cumsum(tokens[density]) <= budget]
        fits = np.flatnonzero(tokens <= budget)
        alone = fits[values[fits].argmax()] if len(fits) else 0
        first = [int(alone)] if len(fits) and values[alone] > values[filled].sum() else []
    return np.concatenate([np.array(first, dtype=np.int64), density[~np.isin(density, first)]])


def batch_by_batch(order: Array, scores: Array, share: float, batch: int) -> Array:
    """Return the places that are kept when records come in batches and of each the best share is kept at once, ``round(share * n)`` of them.

    Args:
        order: ``(n,)`` places as they come. scores: ``(n,)`` finite, higher is better; ties by coming first.
    """
    kept: list[Array] = [np.empty(0, dtype=np.int64)]
    there = 0
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        more = round(share * (start + len(some))) - there
        kept.append(some[np.argsort(-scores[some], kind="stable")[:more]])
        there += more
    return np.concatenate(kept)
