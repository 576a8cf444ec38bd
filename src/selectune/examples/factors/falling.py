"""The highest value, again and again, where each choice lowers the values of others.

Knows: that what was low cannot have risen, so that only the highest few are looked at after each choice, and all of them rarely and
together; exact. Does not know: what the values are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

Array = np.ndarray
CONTENDERS = 1024
"""Values that are kept up to date after each choice."""


class Falling(ABC):
    """Values of records that fall with every choice; what they stand for is their state, ``(n,)``."""

    @abstractmethod
    def of(self, places: Array) -> Falling:
        """Return the same of some records only."""

    @abstractmethod
    def take(self, place: int) -> Array:
        """Choose a record; return the vector by which others are lowered."""

    @abstractmethod
    def lowered(self, state: Array, vectors: Array) -> Array:
        """Return the state after choices.

        Args:
            state: ``(n,)`` before them. vectors: ``(choices, d)`` as :meth:`take` gave them.
        """

    def heights(self, state: Array) -> Array:
        """Return the values that a state stands for, ``(n,)``."""
        return state


def highest_first(falling: Falling, state: Array, count: int) -> tuple[Array, Array]:
    """Return places in the order in which they are chosen ``(count,)`` and their values then; none twice, ties by place.

    After each choice the highest 1,024 are brought up to date, with small products that stay in the processor's cache; when one of them could
    be lower than another record, all are, with one large product. The choice is that of looking at all of them every time, up to rounding.

    Args:
        state: ``(n,)`` float, at the beginning.
    """
    count, taken = min(count, len(state)), np.zeros(len(state), dtype=bool)
    chosen: list[int] = []
    heights: list[float] = []
    while len(chosen) < count:
        values = np.where(taken, -np.inf, falling.heights(state))
        ranking = np.argsort(-values, kind="stable")
        some = np.sort(ranking[:CONTENDERS])
        limit = (np.inf, 0) if len(ranking) <= CONTENDERS else (-values[ranking[CONTENDERS]], ranking[CONTENDERS])
        near, own, vectors = falling.of(some), state[some], []
        while len(chosen) < count:
            now = np.where(taken[some], -np.inf, near.heights(own))
            at = int(now.argmax())
            if (-now[at], some[at]) > limit or taken[some[at]]:
                break
            chosen.append(int(some[at]))
            heights.append(float(now[at]))
            taken[some[at]] = True
            vectors.append(falling.take(int(some[at])))
            own = near.lowered(own, vectors[-1][None])
        state = falling.lowered(state, np.stack(vectors))
    return np.array(chosen, dtype=np.int64), np.array(heights)
