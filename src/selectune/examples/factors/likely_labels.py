"""Which of a record's choices a model finds likely.

Knows: the likelihoods of choices after a question, their shares, and how much these leave open. Does not know: what is concluded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from selectune.data.chat import Encoded
from selectune.data.records import Message, Record
from selectune.examples.factors.signals import Signal, Worker

Array = np.ndarray


class OfLabels(Signal):
    """The likeliest of a record's choices, its probability among them, and their entropy over the greatest possible; ``(records, 3)``,
    not-a-number without choices."""

    shown: ClassVar[str] = "probabilities of labels"
    width: ClassVar[int | None] = 3
    shots: tuple[tuple[str, str], ...] = ()
    """Answered questions that come before."""
    model: str = ""
    """Whose probabilities they are, where it is not the base."""

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        assert worker is not None
        owners, pieces = [], []
        for number, record in enumerate(records):
            room = worker.encoder.max_length
            said = [worker.encoder.response_ids(choice)[: room // 2] for choice in record.choices]
            asked = worker.encoder.prompt_ids((*turns(self.shots), *record.prompt)) if said else []
            asked = asked[max(map(len, said), default=0) - room :]  # one prompt for all choices
            for ids in said:
                owners.append(number)
                pieces.append(Encoded(asked + ids, [-100] * len(asked) + ids))
        likely: list[list[float]] = [[] for _ in records]
        for owner, found in zip(owners, worker.log_probabilities(pieces), strict=True):
            likely[owner].append(float(found.sum(dtype=np.float64)))
        values = np.full((len(records), 3), np.nan, dtype=np.float32)
        for number, own in enumerate(likely):
            if own:
                shares = np.exp(np.array(own) - max(own))
                shares /= shares.sum()
                values[number] = int(shares.argmax()), shares.max(), entropy(shares)
        return values


def entropy(shares: Array) -> float:
    """Return the entropy of some shares that add up to 1, over that of as many equal ones: from 0 (one is sure) to 1."""
    if len(shares) < 2:
        return 0.0
    return float(-np.sum(shares * np.log(np.maximum(shares, 1e-300))) / np.log(len(shares)))


def turns(shots: Sequence[tuple[str, str]]) -> tuple[Message, ...]:
    """Return answered questions as a conversation."""
    return tuple(message for asked, said in shots for message in (Message("user", asked), Message("assistant", said)))
