"""The built-in general probe: questions, general text and general prompts, so that retention can be measured offline; and conversations to use.

Knows: its files. Does not know: how they are scored. Everything in it was written for this project.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selectune.data import Record


@dataclass(frozen=True)
class Question:
    """A question: the choice is read after the context and one space."""

    id: str
    area: str
    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Passage:
    """A piece of general text."""

    id: str
    genre: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """A general instruction and a good response to it."""

    id: str
    prompt: str
    response: str


def _lines(name: str) -> list[dict[str, Any]]:
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@cache
def load_questions() -> list[Question]:
    """Return the multiple-choice questions."""
    return [Question(**{**row, "choices": tuple(row["choices"])}) for row in _lines("questions.jsonl")]


@cache
def load_general_text() -> list[Passage]:
    """Return the passages that forgetting is measured on."""
    return [Passage(**row) for row in _lines("general_text.jsonl")]


@cache
def load_general_prompts() -> list[Prompt]:
    """Return the prompts that drift from the base is measured on."""
    return [Prompt(**row) for row in _lines("general_prompts.jsonl")]


def general_conversations() -> list[Record]:
    """Return other conversations, which methods may calibrate on or replay: nothing is measured on them."""
    from selectune.data.records import Message, Record

    rows = [Prompt(**row) for row in _lines("general_conversations.jsonl")]
    return [Record("chat", (Message("user", one.prompt), Message("assistant", one.response))) for one in rows]
