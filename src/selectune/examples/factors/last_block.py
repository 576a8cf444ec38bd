"""Gradients of records at a matrix of the last block, where a backward pass is short.

Knows: which linear layer of the last block plays a role, what went into it and what gradient came back to it for each record (without the blocks
before it, where it is known what enters the last), and the effort of a record: the norm of the gradient that a low-rank adapter there would get.
Does not know: what gradients are used for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from selectune.data.chat import Encoded
from selectune.data.records import Record
from selectune.errors import UserError
from selectune.examples.factors.signals import Signal, Worker
from selectune.training.prefix import passed_over

Array = np.ndarray


@dataclass(frozen=True)
class Linear:
    """A linear layer, or the outputs of one that play a role."""

    module: str
    outputs: Tensor | None
    """``(n,)`` int64, on the base's device; None: all."""


def last_linear(base: Any, *roles: str) -> Linear:
    """Return the linear layer of the last block that plays the first of some roles that it has.

    Raises:
        UserError: it has none of them.
    """
    from selectune.parameters.factors.roles import weights_by_role

    last = len(base.anatomy.blocks) - 1
    for role in roles:
        try:
            found = weights_by_role(base, role, biases=False, blocks=[last]).parts
        except UserError:
            continue
        for name, part in found.items():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and len(part.shape) == 2 and module in base.anatomy.blocks[last].linears:
                return Linear(module, None if part.form == "whole" else part.index.to(base.model.device))
    raise UserError(f"the last block of this base has no layer of the kind {' or '.join(roles)}", field="base",
                    expected="a base with linear layers")  # fmt: skip


@contextmanager
def entering(base: Any, states: Tensor | None = None, met: dict[str, Tensor] | None = None) -> Iterator[None]:
    """Within, the graph of a forward pass begins at the last block; where what enters it is given, all before it is passed over.

    Args:
        states: ``(length, hidden)``. met: takes what enters, ``(length, hidden)`` under ``entered``.
    """
    *before, last = (base.model.get_submodule(block.prefix) for block in base.anatomy.blocks)

    def begin(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = (inputs[0] if inputs else named["hidden_states"]).detach() if states is None else states[None]
        if met is not None:
            met["entered"] = hidden[0]
        hidden = hidden.requires_grad_(True)
        return ((hidden, *inputs[1:]), named) if inputs else (inputs, named | {"hidden_states": hidden})

    hook = last.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with passed_over([] if states is None else before):
            yield
    finally:
        hook.remove()


class Met(NamedTuple):
    """What a backward pass met of a piece."""

    number: int
    entered: Tensor
    """What entered the last block, ``(length, hidden)``."""
    inward: Tensor
    """What went into a layer, ``(length, inputs)`` fp32."""
    outward: Tensor
    """The gradient of the piece's summed loss in what came out of the layer, ``(length, outputs)`` fp32; its transpose times ``inward`` is the
    gradient of the layer's weight."""


def gradients_at(
    worker: Worker, pieces: list[Encoded], layer: Linear, entered: Mapping[int, Tensor] | None = None
) -> Iterator[Met]:
    """Give what a layer of the last block meets of each piece.

    Args:
        entered: by the number of a piece what enters the last block, as far as it is known.
    """
    model, known = worker.base.model, entered or {}
    groups, rows = worker.rows(pieces)
    met: dict[str, Tensor] = {}

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        met["in"] = inputs[0].detach()
        output.register_hook(lambda gradient: met.__setitem__("out", gradient.detach()))

    blocks = len(worker.base.anatomy.blocks)
    with ExitStack() as stack:
        stack.enter_context(worker.loss.attending(rows))
        stack.callback(model.get_submodule(layer.module).register_forward_hook(after).remove)
        for members, row in zip(groups, rows, strict=True):
            states = torch.cat([known[member] for member in members]) if known.keys() >= set(members) else None
            with torch.enable_grad(), entering(worker.base, states, met):
                worker.loss(**{key: value[None] for key, value in row.items()}).backward()
            tokens = len(row["input_ids"])
            worker.meter.count(forward=tokens if states is None else tokens // blocks, backward=tokens // blocks)
            inward, outward = (met[side].reshape(-1, met[side].shape[-1]).float() for side in ("in", "out"))
            if layer.outputs is not None:
                outward = outward[:, layer.outputs]
            ends = np.cumsum([len(pieces[member].input_ids) for member in members]).tolist()
            for member, start, end in zip(members, [0, *ends[:-1]], ends, strict=True):
                yield Met(member, met["entered"][start:end].detach(), inward[start:end], outward[start:end])


def pieces_of(worker: Worker, records: list[Record]) -> tuple[list[int], list[Encoded], Array]:
    """Return the pieces of some records, whose each is, and each record's trained tokens ``(records,)``."""
    pairs = [(number, piece) for number, record in enumerate(records) for piece in worker.encoder.encode(record)]
    counts = np.zeros(len(records))
    for number, piece in pairs:
        counts[number] += sum(label != -100 for label in piece.labels[1:])
    return [number for number, _ in pairs], [piece for _, piece in pairs], counts


class Effort(Signal):
    """The norm of the gradient of a record's mean response loss in the output side of a low-rank adapter of the last block's value matrix, at the
    adapter's start: its input side is random (uniform, as adapters begin), its output side is zero."""

    shown: ClassVar[str] = "effort"
    rank: int = 8
    """Of the adapter."""

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        assert worker is not None
        layer = last_linear(worker.base, "value")
        owners, pieces, counts = pieces_of(worker, records)
        found: dict[int, Tensor] = {}
        side: Tensor | None = None
        for member, _, inward, outward in gradients_at(worker, pieces, layer):
            side = self.input_side(inward.shape[1]).to(inward.device) if side is None else side
            gradient = outward.T @ (inward @ side.T)
            found[owners[member]] = found[owners[member]] + gradient if owners[member] in found else gradient
        norms = [float(found[number].norm()) / counts[number] if number in found else 0.0 for number in range(len(records))]
        return np.array(norms)

    def input_side(self, width: int) -> Tensor:
        """Return the adapter's input side, ``(rank, width)``."""
        generator = torch.Generator().manual_seed(0)
        return (torch.rand(self.rank, width, generator=generator) * 2 - 1) / math.sqrt(width)
