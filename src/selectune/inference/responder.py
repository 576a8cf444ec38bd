"""Answers of a model to prompts: of the base at hand, of another local model, or of an endpoint.

Knows: that a question is asked once, whoever asks it again; how an answer drawn at random depends on its question and a seed alone; and which
responder a method's settings name. Does not know: what is asked, or how an endpoint is spoken to.

Kept beside what is measured: ``answers.sqlite``, an answer for each question (hash of the model, the messages and how it is asked), as they come.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.progress import track
from torch import Tensor

from selectune.data.records import Message
from selectune.errors import UserError

if TYPE_CHECKING:
    from selectune.examples.pool import Pool
    from selectune.meter import Meter

TOGETHER = 32
"""Answers that a local model writes at once."""


class Responder(Protocol):
    """Whoever answers."""

    def answers(
        self,
        prompts: Sequence[Sequence[Message]],
        *,
        samples: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        seed: int = 0,
    ) -> list[list[str]]:
        """Return ``samples`` answers to each prompt.

        Args:
            temperature: 0 for the likeliest answer (all samples are then one and the same). seed: of what is drawn.

        Raises:
            UserError: the model does not answer.
        """
        ...


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


class Remembering(ABC):
    """A responder that asks no question twice.

    Args:
        kept: a file that remembers over runs; left out: in memory only. quiet: show no progress.
    """

    model: str
    """Whose answers they are, for the file: what answers differently has another name."""
    shown = "answers"
    """What a person sees meanwhile."""

    def __init__(self, kept: Path | None = None, quiet: bool = False) -> None:
        self._kept, self._quiet = kept, quiet
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
        """Return ``samples`` answers to each prompt, see :class:`Responder`."""
        drawn = samples if temperature > 0 else 1
        asked = [
            [
                Question(tuple(prompt), number, temperature, max_new_tokens, seed if temperature > 0 else 0)
                for number in range(drawn)
            ]
            for prompt in prompts
        ]
        keys = {question: question.key(self.model) for own in asked for question in own}
        with closing(_open(self._kept)) as file:
            self._known |= _read(file, [key for key in keys.values() if key not in self._known])
            missing = [question for question, key in sorted(keys.items(), key=lambda pair: pair[1]) if key not in self._known]
            coming = self.ask(missing) if missing else iter(())
            shown = len(missing) > 1 and not self._quiet
            for question, text in (
                track(coming, self.shown, len(missing), console=Console(file=sys.stderr), transient=True) if shown else coming
            ):
                self._known[keys[question]] = text
                file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (keys[question], text))
                file.commit()
        found = [[self._known[keys[question]] for question in own] for own in asked]
        return [own * samples if drawn < samples else own for own in found]


def _open(path: Path | None) -> sqlite3.Connection:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = sqlite3.connect(path or ":memory:", timeout=60)
        file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID")
    except sqlite3.Error as error:
        raise UserError(
            f"answers cannot be kept there ({error})", file=path, mend="remove the file or name another folder"
        ) from None
    return file


def _read(file: sqlite3.Connection, keys: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for start in range(0, len(keys), 500):
        some = keys[start : start + 500]
        found |= dict(file.execute(f"SELECT key, text FROM answers WHERE key IN ({','.join('?' * len(some))})", some))
    return found


class LocalResponder(Remembering):
    """A model on this machine answers, many questions at once.

    The likeliest answer is the greedy one. One drawn at random adds Gumbel noise to the logits over the temperature and takes the largest, which
    draws from the model's own distribution; the noise follows from the question, its sample's number and the seed.

    Args:
        base: the model. encoder: turns messages into its tokens. meter: counts tokens.
    """

    def __init__(
        self, base: Any, encoder: Any, meter: Meter | None = None, kept: Path | None = None, quiet: bool = False
    ) -> None:
        super().__init__(kept, quiet)
        self.base, self.encoder, self.meter = base, encoder, meter
        self.model = f"{base.fingerprint} {encoder.system or ''}"

    def ask(self, questions: list[Question]) -> Iterator[tuple[Question, str]]:
        """Write the answers, the shortest prompts first (see :meth:`Remembering.ask`)."""
        prompts = {question: self.encoder.prompt_ids(question.messages) for question in questions}
        ordered = sorted(questions, key=lambda question: (question.max_new_tokens, question.temperature, len(prompts[question])))
        for start in range(0, len(ordered), TOGETHER):
            some = ordered[start : start + TOGETHER]
            yield from zip(some, self._write(some, [prompts[question] for question in some]), strict=True)

    @torch.no_grad()
    def _write(self, questions: list[Question], prompts: list[list[int]]) -> list[str]:
        from transformers import GenerationConfig, LogitsProcessorList

        model, words = self.base.model, self.base.tokenizer
        limit = max(question.max_new_tokens for question in questions)
        room = max(1, (getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048) - limit)
        prompts = [prompt[-room:] for prompt in prompts]
        width, device = max(map(len, prompts)), model.get_input_embeddings().weight.device
        ids = torch.tensor([[words.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        ends = sorted({words.eos_token_id, *_as_list(model.generation_config.eos_token_id)} - {None})
        settings = GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=ends,
            pad_token_id=words.pad_token_id,
        )
        written = model.generate(input_ids=ids, attention_mask=real, generation_config=settings,
                                 logits_processor=LogitsProcessorList([_Drawn(questions)]))[:, width:]  # fmt: skip
        if self.meter is not None:
            self.meter.count(forward=int(real.sum()) + written.numel())
        return [
            words.decode(row[: question.max_new_tokens], skip_special_tokens=True).strip()
            for question, row in zip(questions, written, strict=True)
        ]


class _Drawn:
    """Noise on logits that makes the largest a draw."""

    def __init__(self, questions: list[Question]) -> None:
        self._temperatures = [question.temperature for question in questions]
        self._generators = [torch.Generator().manual_seed(int(question.key("drawn")[:15], 16)) for question in questions]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        for row, (temperature, generator) in enumerate(zip(self._temperatures, self._generators, strict=True)):
            if temperature > 0:
                noise = -torch.empty(scores.shape[1]).exponential_(generator=generator).log()
                scores[row] = scores[row] / temperature + noise.to(scores.device)
        return scores


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class Asking(BaseModel):
    """Settings of a method that asks a model."""

    by_endpoint: str | None = None
    """Base URL of an OpenAI-compatible endpoint that answers, such as ``http://localhost:8000/v1``; left out: a model on this machine does."""
    by_model: str | None = None
    """The model's name at the endpoint; without one, a local base (built-in name, folder or hub id) that answers instead of the run's."""


def responder(settings: Any, pool: Pool) -> Responder:
    """Return whoever answers a method's questions, as its settings (:class:`Asking`) say.

    Raises:
        UserError: an endpoint without a model's name, or a model that cannot be loaded.
    """
    from selectune.models import load_base

    kept = None if pool.folder is None else pool.folder / "answers.sqlite"
    if settings.by_model is None:
        return LocalResponder(pool.base, pool.encoder, pool.meter, kept, pool.quiet)
    base = load_base(settings.by_model, dtype="auto" if pool.bfloat16 else "float32")
    return LocalResponder(base, pool.make_encoder(base.tokenizer), pool.meter, kept, pool.quiet)
