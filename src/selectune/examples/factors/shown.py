"""A record as it looks after an example: one shot of it.

Knows: a record as turns of a conversation, how earlier turns come before it, and that only the record's response is learnt or scored.
Does not know: which example, or what is concluded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from selectune.data.chat import Encoded
from selectune.data.records import Message, Record
from selectune.examples.factors.signals import Worker
from selectune.models.anatomy import context_length

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


def shown_before(worker: Worker, example: Record, record: Record) -> Encoded | None:
    """Return a record's tokens after an example, both as turns of one conversation; labels are the record's response alone. None: no room."""
    return after(worker.encoder, turns_of(example), Record("chat", turns_of(record)), context_length(worker.base.model))


def shown_alone(worker: Worker, record: Record) -> Encoded:
    """Return a record's tokens by itself, in the form in which it follows an example."""
    pieces = worker.encoder.encode(Record("chat", turns_of(record)))
    return pieces[0] if pieces else Encoded([0, 0], [-100, -100])


def turns_of(record: Record) -> tuple[Message, ...]:
    """Return a record as turns of a conversation that others may stand before; system messages are left out."""
    if record.kind == "text":
        return Message("user", "Continue."), Message("assistant", record.text)
    return tuple(message for message in record.messages if message.role != "system")
