"""A record as it looks after an example: one shot of it.

Knows: how earlier turns come before a record's own conversation, and that only the record's response is learnt or scored.
Does not know: which example, or what is concluded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from selectune.data.chat import Encoded
from selectune.data.records import Message, Record

Shot = tuple[str, str]
"""A question and an answer to it."""


def after(encoder: Any, turns: Sequence[Message], record: Record, longest: int) -> Encoded | None:
    """Return a record's tokens behind earlier turns, as one conversation; labels are the record's own.

    Args:
        encoder: of records. longest: tokens that the model's context holds.

    Returns:
        None where the record has no response, no prompt, or there is no room for the turns.
    """
    own = encoder.encode(record)
    if not own or not record.prompt:
        return None
    first = next(place for place, label in enumerate(own[0].labels) if label != -100)
    system = tuple(takewhile(lambda message: message.role == "system", record.messages))
    asked = tuple(takewhile(lambda message: message.role != "assistant", record.messages[len(system) :]))
    ids = encoder.prompt_ids((*system, *turns, *asked))
    if len(ids) + len(own[0].input_ids) - first > longest:
        return None
    return Encoded(ids + own[0].input_ids[first:], [-100] * len(ids) + own[0].labels[first:])


def after_shot(encoder: Any, shot: Shot, record: Record, longest: int) -> Encoded | None:
    """Return a record's tokens behind an answered question, see :func:`after`."""
    return after(encoder, (Message("user", shot[0]), Message("assistant", shot[1])), record, longest)
