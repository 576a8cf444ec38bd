"""Exact choices under a budget of work: the 0/1 knapsack, and the knapsack of a backward pass.

Knows: that a weight's gradient costs its own product, and reaching it costs those of everything above it. Does not know: what a value or a
cost is made of.
"""

from __future__ import annotations

from collections.abc import Sequence


def knapsack(values: Sequence[float], costs: Sequence[int], budget: int) -> list[int]:
    """Return the places of a set of items with the highest total value whose total cost is within the budget, sorted.

    Items of no positive value are left out. Exact, in ``len(values) * budget`` steps. costs: whole numbers from 0.
    """
    open_ = [place for place in range(len(values)) if values[place] > 0 and costs[place] <= budget]
    best = [0.0] * (budget + 1)
    taken: list[list[bool]] = []
    for place in open_:
        row, cost, value = [False] * (budget + 1), costs[place], values[place]
        for room in range(budget, cost - 1, -1):
            if best[room - cost] + value > best[room]:
                best[room], row[room] = best[room - cost] + value, True
        taken.append(row)
    kept, room = [], budget
    for place, row in zip(reversed(open_), reversed(taken), strict=True):
        if row[room]:
            kept.append(place)
            room -= costs[place]
    return sorted(kept)


def backward_knapsack(values: Sequence[float], own: Sequence[int], passing: Sequence[int], budget: int) -> list[int]:
    """Return the tensors that train: the highest total value whose backward pass is within the budget.

    A set costs ``own`` of each of its tensors and ``passing`` of every tensor from the output down to its deepest, that one included.

    Args:
        values: credit of each tensor, in the order from the output to the input. own, passing: whole numbers from 0. budget: likewise.

    Returns:
        Places, sorted; nothing where no tensor of positive value is within reach.
    """
    best_value, best_set, reached = 0.0, [], 0
    rows: list[list[float]] = [[0.0] * (budget + 1)]  # rows[k][room]: the best of the first k tensors
    for deepest, value in enumerate(values):
        reached += passing[deepest]
        room = budget - reached - own[deepest]
        if value > 0 and room >= 0 and value + rows[deepest][room] > best_value:
            best_value, best_set = value + rows[deepest][room], [deepest, *_above(rows, own, deepest, room)]
        before, cost = rows[-1], own[deepest]
        after = list(before)
        if value > 0:
            for space in range(cost, budget + 1):
                after[space] = max(before[space], before[space - cost] + value)
        rows.append(after)
    return sorted(best_set)


def _above(rows: Sequence[Sequence[float]], own: Sequence[int], count: int, room: int) -> list[int]:
    """The set among the first ``count`` tensors that the table's entry stands for."""
    found = []
    for place in range(count - 1, -1, -1):
        if rows[place + 1][room] > rows[place][room]:
            found.append(place)
            room -= own[place]
    return found
