"""A question is put to a model once, whoever asks it again.

Knows: what makes two questions equal, where answers are kept as they come, and how questions are counted instead of asked. Does not know: how a model
is asked.

Kept: ``answers.sqlite``, an answer for each question (hash of the model, the messages and how the answer is drawn).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from selectune.data.records import Message
from selectune.errors import UserError
from selectune.progress import watched


@dataclass(frozen=True)
class Question:
    """A prompt and how its answer is drawn."""

    messages: tuple[Message, ...]
    sample: int
    temperature: float
    max_new_tokens: int
    seed: int

    def key(self, model: str) -> str:
        """sha256 of the question and whom it is put to, hexadecimal."""
        return hashlib.sha256(json.dumps([model, asdict(self)], ensure_ascii=False).encode()).hexdigest()


@dataclass
class Rehearsal:
    """Questions that would be asked."""

    calls: int = 0
    read: int = 0
    """Tokens of prompts, about (four characters each)."""
    written: int = 0
    """Tokens of answers, at most."""
    counted: set[str] = field(default_factory=set)
    """Keys of the questions."""


class Remembering(ABC):
    """A responder that asks no question twice.

    Args:
        kept: a file that remembers over runs; left out: in memory only. quiet: show no progress. rehearsal: counts the questions that are not
            answered yet instead of asking them; their answers are empty.
    """

    model: str
    """Whose answers they are, for the file: what answers differently has another name."""

    def __init__(self, kept: Path | None = None, quiet: bool = False, rehearsal: Rehearsal | None = None) -> None:
        self.kept, self._quiet, self._rehearsal = kept, quiet, rehearsal
        self._known: dict[str, str] = {}

    @abstractmethod
    def ask(self, questions: list[Question]) -> Iterator[tuple[Question, str]]:
        """Put questions, no two equal, to the model; give each with its answer, as they come."""

    def answers(
        self,
        prompts: Sequence[Sequence[Message]],
        *,
        samples: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        seed: int = 0,
    ) -> list[list[str]]:
        """Return ``samples`` answers to each prompt, see :class:`selectune.inference.responder.Responder`."""
        drawn, seed = (samples, seed) if temperature > 0 else (1, 0)
        asked = [
            [Question(tuple(prompt), number, temperature, max_new_tokens, seed) for number in range(drawn)] for prompt in prompts
        ]
        keys = {question: question.key(self.model) for own in asked for question in own}
        with self._file() as file:
            self._known |= _read(file, [key for key in keys.values() if key not in self._known])
            missing = {key: question for question, key in keys.items() if key not in self._known}
            ordered = [missing[key] for key in sorted(missing)]
            if self._rehearsal is not None:
                self._count(self._rehearsal, missing)
            elif missing:
                for question, text in self._watched(ordered):
                    self._known[keys[question]] = text
                    file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (keys[question], text))
                    file.commit()
        found = [[self._known.get(keys[question], "") for question in own] for own in asked]
        return [own * samples if drawn < samples else own for own in found]

    def _watched(self, questions: list[Question]) -> Iterator[tuple[Question, str]]:
        return iter(watched(self.ask(questions), "answers", self._quiet, len(questions)))

    @staticmethod
    def _count(rehearsal: Rehearsal, missing: dict[str, Question]) -> None:
        new = {key: question for key, question in missing.items() if key not in rehearsal.counted}
        rehearsal.counted |= set(new)
        rehearsal.calls += len(new)
        rehearsal.read += sum(about_tokens(question.messages) for question in new.values())
        rehearsal.written += sum(question.max_new_tokens for question in new.values())

    @contextmanager
    def _file(self) -> Iterator[sqlite3.Connection]:
        """Within, the answers of earlier runs can be read and new ones kept."""
        try:
            if self.kept is not None:
                self.kept.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.kept or ":memory:", timeout=60)) as file:
                file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID")
                yield file
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"answers cannot be kept there ({error})", file=self.kept,
                            mend="free space, remove the file if it is damaged, or name another folder") from None  # fmt: skip


def about_tokens(messages: Sequence[Message]) -> int:
    """Return about how many tokens messages are: four characters each, and four tokens around a message."""
    return sum(len(message.content) // 4 + 5 for message in messages)


def _read(file: sqlite3.Connection, keys: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for start in range(0, len(keys), 500):
        some = keys[start : start + 500]
        found |= dict(file.execute(f"SELECT key, text FROM answers WHERE key IN ({','.join('?' * len(some))})", some))
    return found
