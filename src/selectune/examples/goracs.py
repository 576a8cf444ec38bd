"""A choice that is, as a whole, as near to the target as can be: optimal transport between the two, with a bonus for hard records (GORACS).

Knows: the costs of records toward a target, computed as they are needed (no matrix of all pairs exists), the greedy beginning (in turns, where
many are wanted), and how exchanges of single records lower the exact transport. Does not know: how records are embedded or how hard one is.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from selectune.data.records import Record
from selectune.errors import UserError
from selectune.examples.diverse import Embedded
from selectune.examples.factors.labels import shared_labels
from selectune.examples.factors.last_block import Effort
from selectune.examples.factors.store import measure
from selectune.examples.factors.strata import proportional_shares
from selectune.examples.factors.submodular import lazy_greedy
from selectune.examples.factors.transport import exact
from selectune.examples.method import Array, Choice
from selectune.examples.pool import Pool
from selectune.progress import watched

BLOCK = 2048
"""Records whose costs are computed together."""
LISTED = 4_000_000
"""Records that are listed at once as cheap for the target, over all of it."""
TRIED = 1000
"""Exchanges that are tried at most, each by an exact transport over all pairs of a chosen record and one of the target: of a thousand and a
thousand, a billion pairs in all. A hundred exchanges of ten by ten candidates could ask for ten times as many."""


class Costs:
    """``|e_i - v_j| / max - effort * g_i / max(g)``, brought to 0 to 1 over all pairs.

    Args:
        vectors: ``(n, d)``. target: ``(m, d)``. hardness: ``(n,)``, g. effort: its weight.
    """

    def __init__(self, vectors: Array, target: Array, hardness: Array, effort: float) -> None:
        self._vectors, self._target = vectors.astype(np.float32), target.astype(np.float32)
        self.candidates, self.covered = len(vectors), len(target)
        self._bonus = effort * hardness / max(float(hardness.max()), 1e-12)
        self._scale, self._low, self._range = 1.0, 0.0, 1.0
        far = [self._distances(some).max() for some in self.blocks()]
        self._scale = max(float(max(far)), 1e-12)
        ends = [(found.min(), found.max()) for some in self.blocks() for found in [self.of(some)]]
        self._low = float(min(low for low, _ in ends))
        self._range = max(float(max(high for _, high in ends)) - self._low, 1e-12)

    def blocks(self) -> list[Array]:
        """Return all places in order, a block at a time."""
        return np.array_split(np.arange(self.candidates), -(-self.candidates // BLOCK))

    def of(self, places: Array) -> Array:
        """Return ``(len(places), m)`` float64."""
        return (self._distances(places) / self._scale - self._bonus[places, None] - self._low) / self._range

    def _distances(self, places: Array) -> Array:
        from scipy.spatial.distance import cdist

        return np.asarray(cdist(self._vectors[places], self._target))


class Service:
    """What a choice saves: the sum over the target of one less the smallest cost; for :func:`~selectune.examples.factors.submodular.lazy_greedy`."""

    def __init__(self, costs: Costs) -> None:
        self._costs, self.candidates = costs, costs.candidates
        self._best = np.ones(costs.covered)

    def gains(self, places: Array) -> Array:
        return np.asarray(np.maximum(self._best - self._costs.of(places), 0).sum(1))

    def add(self, place: int) -> None:
        np.minimum(self._best, self._costs.of(np.array([place]))[0], out=self._best)


def begun(costs: Costs, count: int) -> Array:
    """Return so many places: greedily those that serve the target best, without those that serve nobody as soon as as many others do serve.

    Where no such group is met (it never is, of more records than the target has), the target is served in turns.
    """
    if count <= costs.covered:
        order, _ = lazy_greedy(Service(costs), min(costs.candidates, 2 * count))
        best, owner = np.full(costs.covered, np.inf), np.full(costs.covered, -1)
        for number, place in enumerate(order.tolist()):
            found = costs.of(np.array([place]))[0]
            owner[found < best] = place
            best = np.minimum(best, found)
            active = set(owner.tolist())
            if number + 1 >= count and len(active) >= count:
                return np.array([one for one in order.tolist() if one in active][:count])
    return in_turns(costs, count)


def in_turns(costs: Costs, count: int) -> Array:
    """Return so many places: in each turn the cheapest that are left for each of the target, greedily of these in a turn that has too many."""
    free, everybody = np.ones(costs.candidates, dtype=bool), np.arange(costs.covered)
    chosen: list[int] = []
    while len(chosen) < count:
        cheapest = cheapest_for_each(costs, np.flatnonzero(free), min(count - len(chosen), max(1, LISTED // costs.covered)))
        rank = np.zeros(costs.covered, dtype=np.int64)
        while len(chosen) < count and rank.max() < len(cheapest):
            turn = cheapest[rank, everybody]
            if free[turn].all():
                turn = lazy_greedy(Service(costs), count - len(chosen), np.unique(turn))[0]
                chosen += turn.tolist()
                free[turn] = False
            else:
                rank += ~free[turn]
    return np.array(chosen)


def cheapest_for_each(costs: Costs, places: Array, count: int) -> Array:
    """Return so many of some places for each of the target, ``(count, m)``, the cheapest first; ties by place."""
    kept, least = (np.empty((0, costs.covered), dtype=kind) for kind in (np.int64, np.float64))
    for some in np.array_split(places, -(-len(places) // max(BLOCK, count))):
        found = np.concatenate([least, costs.of(some)])
        named = np.concatenate([kept, np.repeat(some[:, None], costs.covered, axis=1)])
        order = np.argsort(found, axis=0, kind="stable")[:count]
        least, kept = np.take_along_axis(found, order, axis=0), np.take_along_axis(named, order, axis=0)
    return kept


def estimates(found: Array, inside: Array, potentials: Array, own: Array | None) -> Array:
    """Return about how much the transport would change if a record joined the choice, the other potentials being as they are; ``(b,)``.

    The new record's potential y is the one that makes ``y / |S| + mean_j min(C_ej - y - f_j, 0)`` largest, f the least reduced cost of the choice.

    Args:
        found: ``(b, m)`` costs of the records. inside: ``(|S|, m)`` costs of the choice. potentials: ``(|S|,)``. own: which row of ``inside`` each
            record is, so that it does not count for itself; left out: none of them.
    """
    reduced = inside - potentials[:, None]
    order = np.argsort(reduced, axis=0, kind="stable")[:2]
    least = np.broadcast_to(reduced.min(0), found.shape)
    if own is not None and len(inside) > 1:
        second = np.take_along_axis(reduced, order[1:2], axis=0)
        least = np.where(order[0][None, :] == own[:, None], second, least)
    left = found - least
    rank = min(-(-found.shape[1] // len(inside)), found.shape[1])
    potential = np.partition(left, rank - 1, axis=1)[:, rank - 1]
    return np.asarray(potential / len(inside) + np.minimum(left - potential[:, None], 0).mean(1))


def exchanged(costs: Costs, chosen: Array, swaps: int, candidates: int, quiet: bool = True) -> tuple[Array, list[float]]:
    """Return the choice after exchanges of single records, each of which lowers the exact transport, and the transport after each.

    Args:
        swaps: at most so many. candidates: the worst inside and the best outside, by estimate, that are tried; the first that helps is taken.
        quiet: show no progress.
    """
    chosen, tries = chosen.copy(), iter(watched(range(TRIED), "exchanges", quiet))
    inside = costs.of(chosen)
    value, potentials = exact(inside)
    values = [value]
    while len(values) <= swaps:
        worst = np.argsort(-estimates(inside, inside, potentials, np.arange(len(chosen))), kind="stable")[:candidates]
        told = np.concatenate([estimates(costs.of(some), inside, potentials, None) for some in costs.blocks()])
        told[chosen] = np.inf
        best = np.argsort(told, kind="stable")[: min(candidates, costs.candidates - len(chosen))]
        for row, place in ((row, place) for row in worst.tolist() for place in best.tolist()):
            if next(tries, None) is None:
                return chosen, values
            moved = inside.copy()
            moved[row] = costs.of(np.array([place]))[0]
            tried, found = exact(moved)
            if tried < value - 1e-12:
                value, potentials, inside = tried, found, moved
                chosen[row] = place
                values.append(value)
                break
        else:
            break
    return chosen, values


class GroupTransport(Embedded):
    """The group of records whose distribution is nearest to the target's, hard records counting as nearer."""

    name: ClassVar[str] = "goracs"
    family: ClassVar[str] = "target"
    paper: ClassVar[str] = (
        "GORACS: Group-level Optimal Transport-guided Coreset Selection for LLM-based Recommender Systems, KDD 2025, arXiv 2506.04015"
    )
    summary: ClassVar[str] = (
        "Greedily and by exchanges the group with the least optimal transport to the target, with a bonus for hard records."
    )
    departs: ClassVar[str] = (
        "The effect of an exchange is estimated at the potential that maximises it. Ten candidates a side are tried instead of thirty, and a "
        "thousand exchanges in all. Vectors are a sentence encoder's unless the base's own are asked for. Where more "
        "are wanted than can serve the target at once, the cheapest that are left for each of it come in turns, before the exchanges. What the "
        "group leaves of a budget of tokens comes by cost."
    )
    needs_target: ClassVar[bool] = True

    effort: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the gradient's norm against the distance (lambda)."""
    swaps: Annotated[int, Field(ge=0)] = 100
    """Exchanges at most."""
    candidates: Annotated[int, Field(gt=0)] = 10
    """Tried on either side of an exchange."""
    wanted: Annotated[int, Field(gt=0)] = 1000
    """Target records that count, the first by hash."""

    def choose(self, pool: Pool) -> Choice:
        from selectune.parameters.factors.gradients import first

        target, order = first(list(pool.target), self.wanted), pool.order
        records = [pool.records[place] for place in order]
        groups = [(near, far) for near, far in _classes(records, target) if len(near) and len(far)]
        if not groups:
            raise UserError(f"'{self.name}' goes by class, and no record has an answer of the target's", field="examples",
                            expected="a target with answers that the pool has")  # fmt: skip
        vectors, wanted = self.embed(pool)[order], measure(pool, self.signal(), target)
        hardness = measure(pool, Effort())[order] if self.effort else np.zeros(len(pool))
        shares = proportional_shares([len(far) for _, far in groups], self.about(pool), [len(near) for near, _ in groups])
        parts, cost = [], np.full(len(pool), np.inf)
        for (near, far), share in zip(groups, shares, strict=True):
            costs = Costs(vectors[near], wanted[far], hardness[near], self.effort)
            cost[near] = np.concatenate([costs.of(some).mean(1) for some in costs.blocks()])
            if share:
                chosen, values = exchanged(costs, begun(costs, share), self.swaps, self.candidates, pool.quiet)
                parts.append(near[chosen])
                pool.notes.append(f"{len(values) - 1} exchanges took the transport from {values[0]:.4f} to {values[-1]:.4f}")
        places = np.concatenate(parts)
        rest = np.setdiff1d(np.arange(len(pool)), places)
        mean = np.empty(len(pool))
        mean[order] = cost
        return Choice(self.fill(pool, order[[*places, *rest[np.argsort(cost[rest], kind="stable")]]]), {"mean cost": mean})


def _classes(records: list[Record], target: list[Record]) -> list[tuple[Array, Array]]:
    """Places of each class in the pool and in the target; one class, where there are no labels."""
    labels = shared_labels([*records, *target])
    if not labels:
        return [(np.arange(len(records)), np.arange(len(target)))]
    near, far = (np.array([record.answer for record in some]) for some in (records, target))
    return [(np.flatnonzero(near == label), np.flatnonzero(far == label)) for label in range(len(labels))]
