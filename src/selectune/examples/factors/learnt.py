"""The base after a short training on records, and what each record's loss is then.

Knows: what such a copy depends on, so that it is trained only where something of it is not known yet: losses are kept as any signal is, for choices
of other budgets and for one that is taken up again. Does not know: how a training goes, or what is chosen by it.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from pydantic import PrivateAttr

from selectune.data.records import Record
from selectune.examples.factors.signals import ResponseLoss, Signal, Worker
from selectune.examples.factors.store import BATCH, measure
from selectune.examples.pool import Pool

Array = np.ndarray


class Learnt:
    """The base after a short training of its blocks' matrices; trained when its model is first asked for.

    Args:
        steps: 0 for the base as it is. records: what it learns, in this order; left out: the pool's, by content.
    """

    def __init__(self, pool: Pool, steps: int, learning_rate: float, records: Sequence[Record] | None = None) -> None:
        self.pool, self.steps, self.learning_rate = pool, steps, learning_rate
        self.records = [pool.records[place] for place in pool.order.tolist()] if records is None else list(records)

    @cached_property
    def name(self) -> str:
        """All that it depends on, besides the base and how that reads records."""
        keys = hashlib.sha256("\n".join(record.key for record in self.records).encode()).hexdigest()
        return f"{self.steps} {self.learning_rate} {self.pool.seed} {keys}"

    @cached_property
    def model(self) -> Any:
        """The copy.

        Raises:
            UserError: none of the records has anything to learn; :class:`selectune.parameters.factors.trial.Diverged`.
        """
        if not self.steps:
            return self.pool.base.model
        return trained_copy(self.pool, self.steps, self.learning_rate, self.records)

    @cached_property
    def worker(self) -> Worker:
        """What measures records with it."""
        found: Worker = self.pool.worker(self.model)
        return found

    def losses(self, pool: Pool | None = None) -> Array:
        """Return each record's mean response loss, of the pool that it learnt from or of another, ``(records,)`` nats per token."""
        signal = LossAfter(learnt=self.name)
        signal._learnt = self
        return measure(self.pool if pool is None else pool, signal)

    def __reduce__(self) -> Any:
        raise pickle.PicklingError("a copy of the base is trained in one process")


class LossAfter(ResponseLoss):
    """A response's loss under a copy of the base that was trained for a short while."""

    shown: ClassVar[str] = "loss of responses after a short training"
    learnt: str
    """The copy's name."""
    _learnt: Learnt = PrivateAttr()

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        return super().measure(self._learnt.worker, records)


def trained_copy(pool: Pool, steps: int, learning_rate: float, records: Sequence[Record], **looking: Any) -> Any:
    """Return a copy of the base after a short training of its blocks' matrices on records, in their order.

    Args:
        looking: ``look`` and ``look_after`` of :func:`selectune.parameters.factors.trial.trial`.
    """
    from selectune.parameters import Selection
    from selectune.parameters.factors.targets import targets
    from selectune.parameters.factors.trial import trial

    chosen = Selection.of(pool.base.model, [target.name for target in targets(pool.base)])
    return trial(pool.context(records), chosen, steps=steps, learning_rate=learning_rate, seed=pool.seed, **looking).model


class LossesAlong(Signal):
    """A response's losses after some of the steps of one short training, ``(records, looks)``; of all records at once, while the copy is there."""

    shown: ClassVar[str] = "losses of responses along a short training"
    width: ClassVar[int | None] = 0
    learnt: str
    """The copy's name."""
    after: tuple[int, ...]
    """Steps after which the copy is looked at."""
    _learnt: Learnt = PrivateAttr()
    _found: dict[str, Array] = PrivateAttr(default_factory=dict)

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        if not self._found:
            self._found = self._trained()
        return np.stack([self._found[record.key] for record in records])

    def _trained(self) -> dict[str, Array]:
        pool, learnt = self._learnt.pool, self._learnt
        known: dict[int, Array] = {}

        def look(step: int, model: Any) -> None:
            known[step] = losses_under(pool, model)

        trained_copy(pool, learnt.steps, learnt.learning_rate, learnt.records, look=look, look_after=set(self.after))
        along = np.stack([known[step] for step in self.after], axis=1).astype(np.float32)
        return dict(zip(pool.keys, along, strict=True))


def losses_along(pool: Pool, steps: int, learning_rate: float, points: int) -> Array:
    """Return each record's mean response loss at evenly spaced points of one short training on the pool, ``(records, points)``.

    The first point is the base, the last the end of the training.
    """
    wanted = np.linspace(0, steps, points).round().astype(int).tolist()
    learnt = Learnt(pool, steps, learning_rate)
    signal = LossesAlong(learnt=learnt.name, after=tuple(sorted(set(wanted) - {0})))
    signal._learnt = learnt
    along = dict(zip(signal.after, measure(pool, signal).T, strict=True)) if len(pool) else {}
    known = {0: measure(pool, ResponseLoss())} | along
    return np.stack([known[step] for step in wanted], axis=1)


def losses_under(pool: Pool, model: Any) -> Array:
    """Return each record's mean response loss under a model that was trained from the base; nothing is kept."""
    known: dict[str, float] = {}
    worker, signal = pool.worker(model), ResponseLoss()
    each = dict(sorted(zip(pool.keys, pool.records, strict=True), key=lambda pair: pair[0]))
    for start in range(0, len(each), BATCH):
        some = list(each)[start : start + BATCH]
        known |= dict(zip(some, signal.measure(worker, [each[key] for key in some]).tolist(), strict=True))
    return np.array([known[key] for key in pool.keys])
