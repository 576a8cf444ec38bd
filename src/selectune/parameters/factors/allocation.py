"""Allocations: how a budget of entries is shared out among units.

Knows: the best anywhere, the same share of every group of like units, the same for every block, the same for every output neuron, given
quotas; exactly, with ties broken by position. Does not know: what a unit is or where its score comes from.

A budget is filled and never exceeded; with units of one entry it is met exactly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from selectune.errors import UserError
from selectune.parameters.factors.units import Units

Allocation = Literal["global", "matrix", "layer", "row"]


def best(scores: Tensor, count: int) -> Tensor:
    """Return the places of the ``count`` highest scores, sorted; ties go to the lower place.

    Args:
        scores: ``(n,)`` float; not-a-number counts as the lowest.
    """
    return is_best(scores, count).nonzero().squeeze(-1)


def is_best(scores: Tensor, count: int) -> Tensor:
    """Return whether each score is one of the ``count`` highest, ``(n,)`` bool; ties go to the lower place. Nothing is sorted.

    Args:
        scores: ``(n,)`` float; not-a-number counts as the lowest.
    """
    if count >= len(scores) or count <= 0:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    scores = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    limit = _nth(scores, len(scores) - count)
    found, equal = scores > limit, scores == limit
    room = count - int(found.sum())
    if int(equal.sum()) > room:
        equal[equal.nonzero().squeeze(-1)[room:]] = False
    return found.logical_or_(equal)


def _nth(values: Tensor, place: int) -> Tensor:
    """Return the value at a place of the ascending order, from 0."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.partition(values.numpy(), place))[place]  # ten times as fast as torch's kthvalue
    return values.kthvalue(place + 1).values


def best_of_rows(scores: Tensor, count: int) -> Tensor:
    """Return the flat places of the ``count`` highest scores of every row, sorted; ties go to the lower place.

    Args:
        scores: ``(rows, columns)`` float; not-a-number counts as the lowest. count: at most the number of columns.
    """
    width = scores.shape[1]
    scores = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    limit = scores.kthvalue(width - count + 1, dim=1, keepdim=True).values
    above, equal = scores > limit, scores == limit
    room = count - above.sum(1, keepdim=True)
    return (above | equal & (equal.cumsum(1) <= room)).view(-1).nonzero().squeeze(-1)


def apportion(total: int, shares: Sequence[float], most: Sequence[int]) -> list[int]:
    """Split a whole number in proportion to shares, each part at most so much; what is left over goes on to the others.

    Largest remainders; ties by index. Whoever would have more than there is has all of it, and the others share the rest.
    """
    given = [0] * len(shares)
    left, open_ = min(total, sum(most)), list(range(len(shares)))
    exact: dict[int, float] = {}
    while open_:
        weight = sum(shares[i] for i in open_)
        exact = {i: left * (shares[i] / weight if weight > 0 else 1 / len(open_)) for i in open_}
        full = [i for i in open_ if exact[i] >= most[i]]
        if not full:
            break
        for i in full:
            given[i] = most[i]
            left -= most[i]
        open_ = [i for i in open_ if exact[i] < most[i]]
    for i in open_:
        given[i] = int(exact[i])
        left -= given[i]
    for i in sorted(open_, key=lambda i: (given[i] - exact[i], i))[:left]:
        given[i] += 1
    return given


def allocate(groups: Sequence[Units], budget: int, how: Allocation = "global") -> list[Tensor]:
    """Return which units of each group are chosen, ``(n,)`` int64 each.

    Args:
        groups: in the order in which ties are broken. budget: entries.
        how: ``global``: the best anywhere; ``matrix``: the same share of every group; ``layer``: the same share of every transformer
            block, the best within it; ``row``: of single entries, the same number for every output neuron.

    Raises:
        UserError: ``row``, and not single entries are chosen.
    """
    if how == "row" and any(group.size > 1 for group in groups):
        raise UserError("`row` shares out single entries, and these are more than one each", field="parameters.allocation",
                        expected="global, matrix or layer, or granularity: element")  # fmt: skip
    if how == "global":
        return _anywhere(groups, budget)
    if how == "row":
        return _by_rows(groups, budget)
    sizes: dict[int, int] = defaultdict(int)
    keys = [number if how == "matrix" else group.block for number, group in enumerate(groups)]
    for key, group in zip(keys, groups, strict=True):
        sizes[key] += len(group.scores) * group.size
    order = sorted(sizes)
    parts = dict(zip(order, apportion(budget, [sizes[k] for k in order], [sizes[k] for k in order]), strict=True))
    found: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(groups)
    for key in order:
        members = [number for number, own in enumerate(keys) if own == key]
        for number, index in zip(members, _anywhere([groups[n] for n in members], parts[key]), strict=True):
            found[number] = index
    return found


def quotas(groups: Sequence[Units], counts: Sequence[int]) -> list[Tensor]:
    """Return the best units of each group, so many of each."""
    return [best(group.scores, count) for group, count in zip(groups, counts, strict=True)]


def _anywhere(groups: Sequence[Units], budget: int) -> list[Tensor]:
    """The best units of all groups, the best first, as long as they fit."""
    scores = torch.cat([group.scores for group in groups])
    starts = torch.tensor([0, *[len(group.scores) for group in groups]]).cumsum(0)
    sizes = {group.size for group in groups}
    if len(sizes) == 1:
        chosen = best(scores, budget // sizes.pop())
    else:
        each = torch.cat([torch.full((len(group.scores),), group.size) for group in groups]).tolist()
        kept, left, least = [], budget, min(sizes)
        for place in _ranked(scores).tolist():
            if each[place] <= left:
                kept.append(place)
                left -= each[place]
                if left < least:
                    break
        chosen = torch.tensor(sorted(kept), dtype=torch.int64)
    return [chosen[(chosen >= a) & (chosen < b)] - a for a, b in pairwise(starts.tolist())]


def _by_rows(groups: Sequence[Units], budget: int) -> list[Tensor]:
    """The same number of entries in each row; the rest of the budget to the rows whose next entry scores highest."""
    rows = sum(len(group.scores) // group.row for group in groups)
    least = budget // rows
    orders = [_ranked(group.scores.view(-1, group.row)) for group in groups]
    counts = [min(least, group.row) for group in groups]
    left = budget - sum(len(order) * count for order, count in zip(orders, counts, strict=True))
    while left > 0:  # more than once only where rows are shorter than what they are given
        following = [
            group.scores.view(-1, group.row).gather(1, order[:, count : count + 1]).squeeze(1)
            if count < group.row
            else group.scores.new_full((len(order),), float("-inf"))
            for group, order, count in zip(groups, orders, counts, strict=True)
        ]
        open_rows = sum(len(order) for group, order, count in zip(groups, orders, counts, strict=True) if count < group.row)
        if left >= open_rows:
            counts = [min(count + 1, group.row) for group, count in zip(groups, counts, strict=True)]
            left -= open_rows
            continue
        extra = best(torch.cat(following), left)
        starts = torch.tensor([0, *[len(order) for order in orders]]).cumsum(0)
        return [
            _row_places(order, count, extra[(extra >= a) & (extra < b)] - a)
            for order, count, a, b in zip(orders, counts, starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        ]
    return [_row_places(order, count, torch.empty(0, dtype=torch.int64)) for order, count in zip(orders, counts, strict=True)]


def _ranked(scores: Tensor) -> Tensor:
    """Return places from the highest score to the lowest, in each row; not-a-number last, ties by place."""
    return scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf")).argsort(
        dim=-1, descending=True, stable=True
    )


def _row_places(order: Tensor, count: int, extra: Tensor) -> Tensor:
    """Flat places of the first ``count`` entries of every row, and of one more in some rows."""
    width = order.shape[1]
    rows = torch.arange(len(order), device=order.device)
    chosen = (rows[:, None] * width + order[:, :count]).view(-1)
    return torch.cat([chosen, extra * width + order[extra, count]] if len(extra) else [chosen]).sort().values
