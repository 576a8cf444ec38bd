"""Records that say again what an earlier record says.

Knows: exact duplicates (equal after lower-casing and squeezing white space) and near ones: Jaccard similarity of their
five-word sequences of at least 0.8 (candidates by MinHash, then computed exactly), the same response, and the same numbers
and codes. The last two conditions keep the records of a domain that differ in one code or one value, and those that ask for
the same fact in another way: these are what a specialist is made of. Does not know: evaluation sets.
"""

from __future__ import annotations

import re
from collections import Counter

from selectune.data.records import Record

THRESHOLD = 0.8
SHINGLE = 5


def normalise(text: str) -> str:
    """Lower case, words and numbers only, single spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))


def content(record: Record) -> str:
    """Return everything a record says, as one text."""
    return record.text or "\n".join(message.content for message in record.messages)


def shingles(text: str) -> set[str]:
    """Return the five-word sequences of a text (the text itself, when it is shorter)."""
    words = normalise(text).split()
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def drop_exact(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Return the records kept and those equal to an earlier one."""
    seen: set[str] = set()
    kept: list[Record] = []
    dropped: list[Record] = []
    for record in records:
        roles = "|".join(message.role for message in record.messages)
        key = f"{roles}\n{normalise(content(record))}" if normalise(content(record)) else content(record)
        (dropped if key in seen else kept).append(record)
        seen.add(key)
    return kept, dropped


def drop_near(records: list[Record], threshold: float = THRESHOLD) -> tuple[list[Record], list[Record]]:
    """Return the records kept and those nearly equal to an earlier kept one."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=64)
    kept_shingles: dict[str, set[str]] = {}
    groups: dict[tuple[str, frozenset[tuple[str, int]]], list[int]] = {}
    for position, record in enumerate(records):
        groups.setdefault(_must_equal(record), []).append(position)
    dropped_positions: set[int] = set()
    for members in groups.values():
        if len(members) == 1:
            continue
        for position in members:
            mine = shingles(content(records[position]))
            sketch = MinHash(num_perm=64, seed=1)
            sketch.update_batch([shingle.encode() for shingle in mine])
            group = id(members)
            near = [name for name in index.query(sketch) if name.startswith(f"{group}:")]
            if any(len(mine & kept_shingles[name]) >= threshold * len(mine | kept_shingles[name]) for name in near):
                dropped_positions.add(position)
            else:
                index.insert(f"{group}:{position}", sketch)
                kept_shingles[f"{group}:{position}"] = mine
    kept = [record for position, record in enumerate(records) if position not in dropped_positions]
    return kept, [records[position] for position in sorted(dropped_positions)]


def _must_equal(record: Record) -> tuple[str, frozenset[tuple[str, int]]]:
    """The response, and every word with a digit in it: what near duplicates must agree on."""
    response = normalise(record.response) if record.messages else ""
    numbers = Counter(re.findall(r"\w*\d\w*", content(record).lower()))
    return response, frozenset(numbers.items())
