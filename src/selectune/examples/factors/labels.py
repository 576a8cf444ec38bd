"""Records with a closed set of answers.

Knows: whether records share one set of labels, and a record with another answer. Does not know: what labels are used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from selectune.data.records import Message, Record


def shared_labels(records: Sequence[Record]) -> tuple[str, ...] | None:
    """Return the labels that all records may be answered with, or None where they have no set in common or one of them no answer."""
    sets = {record.choices for record in records}
    labels = next(iter(sets)) if len(sets) == 1 else ()
    return labels if len(labels) > 1 and all(0 <= record.answer < len(labels) for record in records) else None


def answered(record: Record, label: int) -> Record:
    """Return a record with another of its choices as its answer."""
    return replace(record, messages=(*record.prompt, Message("assistant", record.choices[label])), answer=label)
