"""Signals: what can be measured of a record by itself.

Knows: lengths, losses of responses (with their prompt, or alone), embeddings (the base's own, or a small sentence encoder's), and sketches of
gradients. Does not know: how signals are kept, or what is chosen by them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from selectune.data.chat import Encoded
from selectune.data.packing import pack
from selectune.data.records import Message, Record
from selectune.meter import Meter

Array = np.ndarray
Projection = tuple[Tensor, Tensor, Tensor]
"""Of a matrix's gradient: the adapter's input side, and the places and signs of its output side in the sketch."""


@dataclass
class Worker:
    """A base that measures records."""

    base: Any
    encoder: Any
    bfloat16: bool
    seed: int
    meter: Meter

    @cached_property
    def loss(self) -> Any:
        """The base with an ordinary loss, as training has it."""
        from selectune.objectives.cross_entropy import CrossEntropy
        from selectune.training.loss import LossOfModel

        return LossOfModel(self.base.model, CrossEntropy(), self.bfloat16)

    def rows(self, pieces: list[Encoded]) -> tuple[list[list[int]], list[dict[str, Tensor]]]:
        """Return the numbers of the pieces that share a row, and the rows, on the base's device."""
        groups, device = list(packs([len(piece.input_ids) for piece in pieces], self.encoder.max_length)), self.base.model.device
        rows = [pack_in_order([pieces[member] for member in members]) for members in groups]
        return groups, [{key: value.to(device) for key, value in row.items()} for row in rows]

    def states(self, pieces: list[Encoded]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Give each piece's number, hidden states ``(length, hidden)`` and labels ``(length,)``; several pieces go through the base at once."""
        from selectune.data.packing import record_spans

        groups, rows = self.rows(pieces)
        with torch.no_grad(), self.loss.attending(rows):
            for members, row in zip(groups, rows, strict=True):
                inputs: dict[str, Any] = {key: row[key][None] for key in ("input_ids", "position_ids")}
                if self.loss.by_record:
                    inputs["records"] = record_spans(inputs["position_ids"])
                with torch.autocast(row["input_ids"].device.type, torch.bfloat16, enabled=self.bfloat16):
                    hidden = self.loss.split.hidden(**inputs)[0]
                self.meter.count(forward=len(row["input_ids"]))
                start = 0
                for member in members:
                    end = start + len(pieces[member].input_ids)
                    yield member, hidden[start:end], row["labels"][start:end]
                    start = end

    def log_probabilities(self, pieces: list[Encoded]) -> list[Array]:
        """Return the log-probability of each labelled token of each piece, fp32."""
        found: list[Array] = [np.empty(0, np.float32)] * len(pieces)
        for member, hidden, labels in self.states(pieces):
            with torch.no_grad(), torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.bfloat16):
                said = self.loss.objective.loss(self.loss.split.logits, hidden[None], labels[None])
            found[member] = said.log_probability.float().cpu().numpy()
        return found


def pack_in_order(pieces: list[Encoded]) -> dict[str, Tensor]:
    """Return pieces as one row, one after the other, see :func:`selectune.data.packing.pack`."""
    rows = [pack([piece], len(piece.input_ids), packing=False)[0] for piece in pieces]
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def packs(lengths: list[int], capacity: int) -> Iterator[list[int]]:
    """Numbers of pieces that share a row: the longest first, as many as fit."""
    row: list[int] = []
    room = capacity
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        if row and lengths[number] > room:
            yield row
            row, room = [], capacity
        row.append(number)
        room -= lengths[number]
    if row:
        yield row


class Signal(BaseModel, ABC):
    """Something that is measured of a record by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shown: ClassVar[str]
    """What a person sees while it is measured."""
    needs_base: ClassVar[bool] = True
    width: ClassVar[int | None] = None
    """None for a number; otherwise it is a vector."""
    together: ClassVar[int | None] = None
    """Records that are measured, and kept, at a time: few where each takes seconds. None: as many as of other signals."""

    def settings(self) -> dict[str, Any]:
        """Return all that its values depend on, besides base and record."""
        return self.model_dump()

    @abstractmethod
    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        """Return the values of some records, ``(records,)`` float64 or ``(records, width)`` float32."""


class ResponseLoss(Signal):
    """Mean negative log-likelihood of the response's tokens, nats per token."""

    shown: ClassVar[str] = "loss of responses"
    conditional: bool = True
    """With the prompt before it; otherwise the response stands alone after the first token."""

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        assert worker is not None
        owners, pieces = self._pieces(worker, records)
        sums, counts = np.zeros(len(records)), np.zeros(len(records))
        for owner, found in zip(owners, worker.log_probabilities(pieces), strict=True):
            sums[owner] -= found.sum(dtype=np.float64)
            counts[owner] += len(found)
        return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)

    def _pieces(self, worker: Worker, records: list[Record]) -> tuple[list[int], list[Encoded]]:
        owners, pieces = [], []
        for number, record in enumerate(records):
            for piece in worker.encoder.encode(record):
                if not self.conditional:
                    first = worker.base.tokenizer.bos_token_id
                    kept = [label for label in piece.labels if label != -100]
                    ids = [first if first is not None else piece.input_ids[0], *kept]
                    piece = Encoded(ids, [-100, *kept])
                owners.append(number)
                pieces.append(piece)
        return owners, pieces


class OwnEmbedding(Signal):
    """Mean of the base's last hidden states over a text's tokens but the first, unit length, fp32."""

    shown: ClassVar[str] = "embedding by the base"
    width: ClassVar[int | None] = 0
    of: str = "question"
    """``question``, ``response`` or ``both``."""

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        assert worker is not None
        limit = worker.encoder.max_length
        pieces = []
        for record in records:
            ids = worker.base.tokenizer(text_of(record, self.of))["input_ids"][:limit] or [worker.base.tokenizer.eos_token_id]
            pieces.append(Encoded(ids, [-100] * len(ids)))
        found = np.zeros((len(records), worker.base.anatomy.hidden_size), dtype=np.float32)
        for member, hidden, _ in worker.states(pieces):
            inner = hidden[1:] if len(hidden) > 1 else hidden
            found[member] = torch.nn.functional.normalize(inner.float().mean(0), dim=0).cpu().numpy()
        return found


class SentenceEmbedding(Signal):
    """Embedding by a small sentence encoder (all-MiniLM-L6-v2, 384 dimensions), unit length, fp32."""

    shown: ClassVar[str] = "embedding by the sentence encoder"
    needs_base: ClassVar[bool] = False
    width: ClassVar[int | None] = 384
    of: str = "question"
    """``question``, ``response`` or ``both``."""

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        from selectune.models.sentence_encoder import sentence_encoder

        return sentence_encoder().embed([text_of(record, self.of) for record in records])


class GradientSketch(Signal):
    """A random projection of the gradient of a record's mean response loss, fp32.

    Of every matrix of the blocks the gradient of a low-rank adapter's output side is taken at its start (its input side is random and fixed),
    and all of them are added into one vector with random signs at random places (a count sketch: inner products are kept on average).
    """

    shown: ClassVar[str] = "sketch of gradients"
    width: ClassVar[int | None] = 0
    dimension: int = 1024
    rank: int = 4
    """Of the adapter whose gradient is sketched."""
    unit: bool = True
    """Scaled to unit length."""
    sketch_seed: int = 0

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        assert worker is not None
        pieces = [(number, piece) for number, record in enumerate(records) for piece in worker.encoder.encode(record)]
        found = torch.zeros(len(records), self.dimension, device=worker.base.model.device)
        counts = np.zeros(len(records))
        groups, rows = worker.rows([piece for _, piece in pieces])
        projections: dict[int, Projection] = {}
        for number, piece in pieces:
            counts[number] += sum(label != -100 for label in piece.labels[1:])
        with worker.loss.attending(rows):
            for members, row in zip(groups, rows, strict=True):
                ends = np.cumsum([len(pieces[member][1].input_ids) for member in members]).tolist()
                spans = list(zip([0, *ends[:-1]], ends, strict=True))
                self._one_row(worker, row, spans, [pieces[member][0] for member in members], projections, found)
        values = found.cpu().numpy() / np.maximum(counts, 1)[:, None]
        norms = np.linalg.norm(values, axis=1, keepdims=True)
        return (
            np.where(norms > 0, values / np.where(norms > 0, norms, 1), 0).astype(np.float32)
            if self.unit
            else values.astype(np.float32)
        )

    def _one_row(
        self, worker: Worker, row: dict[str, Tensor], spans: list[tuple[int, int]], owners: list[int],
        projections: dict[int, Projection], into: Tensor,
    ) -> None:  # fmt: skip
        model, names = worker.base.model, [name for block in worker.base.anatomy.blocks for name in block.linears]
        flags = {name: value.requires_grad for name, value in model.named_parameters()}
        model.requires_grad_(False)
        entry = model.get_input_embeddings()
        with ExitStack() as stack:
            handle = entry.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
            stack.callback(handle.remove)
            for place, name in enumerate(names):
                module = model.get_submodule(name)
                stack.callback(module.register_forward_hook(self._hook(place, spans, owners, projections, into)).remove)
            worker.loss(**{key: value[None] for key, value in row.items()}).backward()
        for name, value in model.named_parameters():
            value.requires_grad_(flags[name])
        worker.meter.count(forward=len(row["input_ids"]), backward=len(row["input_ids"]))

    def _projection(self, place: int, inputs: int, outputs: int, device: torch.device) -> Projection:
        generator = torch.Generator().manual_seed(self.sketch_seed * 1_000_003 + place)
        side = torch.randn(self.rank, inputs, generator=generator) / math.sqrt(self.rank)
        buckets = torch.randint(self.dimension, (outputs * self.rank,), generator=generator)
        signs = torch.randint(2, (outputs * self.rank,), generator=generator) * 2.0 - 1
        return side.to(device), buckets.to(device), signs.to(device)

    def _hook(
        self, place: int, spans: list[tuple[int, int]], owners: list[int], projections: dict[int, Projection], into: Tensor
    ) -> Any:
        def after(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            state = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            if place not in projections:
                projections[place] = self._projection(place, state.shape[1], output.shape[-1], state.device)
            side, buckets, signs = projections[place]
            with torch.autocast(state.device.type, enabled=False):
                met = state.float() @ side.T

            def back(gradient: Tensor) -> None:
                flat = gradient.detach().reshape(-1, gradient.shape[-1]).float()
                for (start, end), owner in zip(spans, owners, strict=True):
                    product = (flat[start:end].T @ met[start:end]).reshape(-1)
                    into[owner].index_add_(0, buckets, product * signs)

            output.register_hook(back)

        return after


def text_of(record: Record, which: str) -> str:
    """Return a record's question, its response, or both."""
    if which == "question":
        return record.question
    if which == "response":
        return record.response
    return record.text or "\n".join(message.content for message in record.messages)


def asking(prompt: str, answer: str = "") -> Record:
    """Return a conversation of one question (and answer), for signals that ask the base something."""
    return Record("chat", (Message("user", prompt), Message("assistant", answer)))
