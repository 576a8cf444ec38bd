"""Records that say again what an earlier record says.

Knows: exact duplicates (equal after lower-casing and squeezing white space) and near ones: Jaccard similarity of their
five-word sequences of at least 0.8 (candidates by MinHash, then computed exactly), the same response, and the same numbers
and codes. The last two conditions keep the records of a domain that differ in one code or one value, and those that ask for
the same fact in another way: these are what a specialist is made of. Does not know: evaluation sets.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from selectune.data.records import Record

THRESHOLD = 0.8
SHINGLE = 5
TABLES = (10, 6)
"""Tables of MinHash, and rows of each."""
Array = np.ndarray


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
    """Return the records kept and those nearly equal to an earlier kept one, with the same response and the same numbers and codes."""
    repeated = near_repeats(records, threshold, _must_equal).tolist()
    kept = [record for record, of in zip(records, repeated, strict=True) if of < 0]
    return kept, [record for record, of in zip(records, repeated, strict=True) if of >= 0]


def near_repeats(
    records: Sequence[Record], threshold: float = THRESHOLD, must_equal: Callable[[Record], Hashable] = lambda record: None
) -> Array:
    """Return the place of the earlier record that each one nearly repeats, -1 where there is none; ``(records,)`` int64.

    A record that repeats another is not itself repeated. Candidates come from MinHash tables (at a similarity of 0.8, 19 of 20 are found),
    and are then compared exactly; of a record that is kept nothing stays but its entries in the tables.

    Args:
        threshold: Jaccard similarity of five-word sequences. must_equal: only records of which this is the same are compared.
    """
    from datasketch import MinHash, MinHashLSH

    groups: dict[Hashable, list[int]] = {}
    for place, record in enumerate(records):
        groups.setdefault(must_equal(record), []).append(place)
    found = np.full(len(records), -1, dtype=np.int64)
    for members in groups.values():
        if len(members) == 1:
            continue
        tables = MinHashLSH(num_perm=64, params=TABLES)
        for place in members:
            mine = shingles(content(records[place]))
            sketch = MinHash(num_perm=64, seed=1)
            sketch.update_batch([shingle.encode() for shingle in mine])
            for other in sorted(tables.query(sketch)):
                theirs = shingles(content(records[other]))
                if len(mine & theirs) >= threshold * len(mine | theirs):
                    found[place] = other
                    break
            else:
                tables.insert(place, sketch)
    return found


def _must_equal(record: Record) -> tuple[str, frozenset[tuple[str, int]]]:
    """The response, and every word with a digit in it: what near duplicates must agree on."""
    response = normalise(record.response) if record.messages else ""
    numbers = Counter(re.findall(r"\w*\d\w*", content(record).lower()))
    return response, frozenset(numbers.items())
