"""What is planted among the records of a pool, and how much of it a choice keeps.

Knows: wrong answers, exact and near copies, each drawn by seed, and the account from which a choice is judged later by the hashes of its
records alone. Does not know: where records come from, or how they are chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from pydantic import Field

from selectune.data.records import Message, Record
from selectune.run import Written

GENERAL, IN_DOMAIN, OFF_DOMAIN, WRONG = "general", "in domain", "off domain", "wrong answer"
EXACT, NEAR = "exact duplicate", "near duplicate"
NOISE = (WRONG, OFF_DOMAIN, EXACT, NEAR)
"""What a choice should leave out."""
_SPOKEN = ("Please answer this. ", "Here is a question for you: ", "Task: ", "I would like to know this. ")


class Account(Written):
    """What was planted, by the hash of a record's content."""

    kinds: dict[str, str] = Field(default_factory=dict)
    """Every record but near copies -> ``general``, ``in domain``, ``off domain`` or ``wrong answer``."""
    copies: dict[str, int] = Field(default_factory=dict)
    """Records that are there more than once -> how often."""
    twins: dict[str, str] = Field(default_factory=dict)
    """Near copies -> the record that they say again."""

    def sizes(self) -> dict[str, int]:
        """Return how many records of each kind the pool has; of copies those that are one too many."""
        return dict(Counter(self.kinds.values())) | {EXACT: sum(self.copies.values()) - len(self.copies), NEAR: len(self.twins)}

    def kept(self, keys: Iterable[str]) -> dict[str, float]:
        """Return the share of each kind that a choice keeps.

        Args:
            keys: of the chosen records, a record that was chosen twice twice.

        Returns:
            Kind -> share, from 0 to 1. A duplicate counts as kept only beside what it says again. Kinds that were not planted are left out.
        """
        times = Counter(keys)
        found = Counter(self.kinds[key] for key in times if key in self.kinds)
        found[EXACT] = sum(max(0, times[key] - 1) for key in self.copies)
        found[NEAR] = sum(key in times and twin in times for key, twin in self.twins.items())
        return {kind: found[kind] / size for kind, size in self.sizes().items() if size}


def plant(
    parts: Mapping[str, Sequence[Record]], wrong: float, exact: float, near: float, seed: int
) -> tuple[list[Record], Account]:
    """Return a pool, mixed by seed, and what was planted in it.

    Args:
        parts: ``general``, ``in domain`` and ``off domain`` -> records, no two equal. wrong: share of the general and in-domain records whose
            answers change places, among those of one source. exact, near: copies to add, as shares of the same records; of right ones, and
            no record is copied twice.

    Raises:
        ValueError: shares that leave too few right records to be copied.
    """
    generator = np.random.default_rng(seed)
    account, pool = Account(), list[Record]()
    both = {GENERAL: parts.get(GENERAL, ()), IN_DOMAIN: parts.get(IN_DOMAIN, ())}
    right: list[Record] = []
    for kind, records in both.items():
        for record, wronged in _exchanged(list(records), wrong, generator):
            account.kinds[record.key] = WRONG if wronged else kind
            pool.append(record)
            if not wronged:
                right.append(record)
    for record in parts.get(OFF_DOMAIN, ()):
        account.kinds[record.key] = OFF_DOMAIN
        pool.append(record)
    size = len(pool) - len(parts.get(OFF_DOMAIN, ()))
    copied = [right[place] for place in generator.permutation(len(right))]
    exactly, nearly = round(exact * size), round(near * size)
    if exactly + nearly > len(copied):
        raise ValueError(f"{exactly + nearly} copies are asked for and {len(copied)} records are right")
    for record in copied[:exactly]:
        account.copies[record.key] = 2
        pool.append(record)
    for record in copied[exactly : exactly + nearly]:
        twin = nearly_equal(record, generator)
        account.twins[twin.key] = record.key
        pool.append(twin)
    return [pool[place] for place in generator.permutation(len(pool))], account


def _exchanged(records: list[Record], share: float, generator: np.random.Generator) -> list[tuple[Record, bool]]:
    """Return records, a share of each source's with the answer of another one, and whether that is so."""
    sources: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        sources.setdefault(record.source, []).append(place)
    found = [(record, False) for record in records]
    for places in sources.values():
        drawn = generator.permutation(places)[: round(share * len(places))].tolist()
        for place, other in zip(drawn, drawn[1:] + drawn[:1], strict=True):
            changed = _answered(records[place], records[other], generator)
            found[place] = (changed, changed.response != records[place].response)
    return found


def _answered(record: Record, other: Record, generator: np.random.Generator) -> Record:
    """Return a record with the answer of another; where there are choices, with another choice."""
    if not record.choices:
        return replace(record, messages=(*record.prompt, Message("assistant", other.response)))
    answer = (record.answer + 1 + int(generator.integers(max(1, len(record.choices) - 1)))) % len(record.choices)
    return replace(record, messages=(*record.prompt, Message("assistant", record.choices[answer])), answer=answer)


def nearly_equal(record: Record, generator: np.random.Generator) -> Record:
    """Return a record that says the same: some words before the question, and one in twenty of a long answer's left out."""
    asked = [place for place, message in enumerate(record.messages) if message.role == "user"]
    messages = list(record.messages)
    if asked:
        messages[asked[-1]] = Message("user", _SPOKEN[int(generator.integers(len(_SPOKEN)))] + messages[asked[-1]].content)
    words = record.response.split(" ")
    if not record.choices and len(words) >= 20:
        gone = set(generator.permutation(len(words))[: len(words) // 20].tolist())
        said = " ".join(word for place, word in enumerate(words) if place not in gone)
        messages[-1] = Message("assistant", said)
    return replace(record, messages=tuple(messages))
