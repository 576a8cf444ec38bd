"""A record: one conversation, question with choices, labelled text, or piece of raw text.

Knows: the one form into which every input shape is turned, and its exact round trip to a file.
Does not know: where records come from or how a model reads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from selectune.run import write_atomically

Kind = Literal["chat", "choice", "classification", "text"]


@dataclass(frozen=True)
class Message:
    """One turn, as in OpenAI-style chat records."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """One example; its last message is the response."""

    kind: Kind
    messages: tuple[Message, ...] = ()
    text: str = ""
    choices: tuple[str, ...] = ()
    answer: int = -1
    source: str = ""
    line: int = 0
    weight: float = 1.0
    """Of its tokens' losses in training; no part of the content."""

    @cached_property
    def key(self) -> str:
        """sha256 of the content, hexadecimal: splits, limits and item ids follow it."""
        content = [self.kind, [[m.role, m.content] for m in self.messages], self.text, self.choices, self.answer]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def response(self) -> str:
        return self.messages[-1].content if self.messages else self.text

    @property
    def question(self) -> str:
        """What is asked: the last user message, or the raw text."""
        asked = [message.content for message in self.prompt if message.role == "user"]
        return asked[-1] if asked else self.text

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}"


def records_to_file(records: Iterable[Record], path: Path) -> None:
    """Write records as JSON lines, atomically."""
    write_atomically(path, "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))


def records_from_file(path: Path) -> list[Record]:
    """Read what :func:`records_to_file` wrote."""
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            values = json.loads(line)
            values["messages"] = tuple(Message(**message) for message in values["messages"])
            values["choices"] = tuple(values["choices"])
            records.append(Record(**values))
    return records
