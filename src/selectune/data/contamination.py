"""Training records that hold what an evaluation set asks.

Knows: overlap by any common sequence of 13 words (as in GPT-3's and lm-eval's checks), and, for evaluation texts shorter than
that, equality with the record's question. A sequence that more than ten training records share is a template (an instruction,
a log line's pattern), not a leaked item, and is passed over, as in GPT-3's check (Brown et al. 2020, appendix C).
Does not know: which evaluation sets a run has; they are given as texts.
"""

from __future__ import annotations

from collections import Counter

from selectune.data.duplicates import content, normalise
from selectune.data.records import Record

LENGTH = 13
COMMON = 10


class ContaminationIndex:
    """What the evaluation sets say, ready to be looked up.

    Args:
        texts: name of an evaluation set -> its items' texts.
        train: the training records, among which templates are found.
    """

    def __init__(self, texts: dict[str, list[str]], train: list[Record] | None = None) -> None:
        self._grams: dict[str, set[int]] = {}
        self._whole: dict[str, set[str]] = {}
        for name, items in texts.items():
            grams, whole = self._grams.setdefault(name, set()), self._whole.setdefault(name, set())
            for item in items:
                words = normalise(item).split()
                if len(words) >= LENGTH:
                    grams |= _grams(words)
                if words:
                    whole.add(" ".join(words))
        everything = set().union(*self._grams.values()) if self._grams else set()
        counts: Counter[int] = Counter()
        for record in train or []:
            counts.update(_grams(normalise(content(record)).split()) & everything)
        templates = {gram for gram, count in counts.items() if count > COMMON}
        for grams in self._grams.values():
            grams -= templates

    def overlaps(self, record: Record) -> list[str]:
        """Return the names of the evaluation sets that a record overlaps with."""
        grams = _grams(normalise(content(record)).split())
        question = normalise(record.question)
        return [name for name in self._grams if question in self._whole[name] or not grams.isdisjoint(self._grams[name])]


def without_overlap(records: list[Record], texts: dict[str, list[str]]) -> list[Record]:
    """Return the records that overlap with no evaluation set; templates are those among the records themselves."""
    index = ContaminationIndex(texts, records)
    return [record for record in records if not index.overlaps(record)]


def _grams(words: list[str]) -> set[int]:
    return {hash(tuple(words[i : i + LENGTH])) for i in range(len(words) - LENGTH + 1)}
