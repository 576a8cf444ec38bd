"""Gradients of records at a matrix of the last block, where a backward pass is short.

Knows: which linear layer of the last block plays a role, what went into it and what gradient came back to it for each record, and the effort of a
record: the norm of the gradient that a low-rank adapter there would get. Does not know: what gradients are used for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from selectune.data.chat import Encoded
from selectune.data.records import Record
from selectune.errors import UserError
from selectune.examples.factors.signals import Signal, Worker, pack_in_order, packs

Array = np.ndarray


@dataclass(frozen=True)
class Linear:
    """A linear layer, or the outputs of one that play a role."""

    module: str
    outputs: Tensor | None
    """``(n,)`` int64; None: all."""


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
                return Linear(module, None if part.form == "whole" else part.index)
    raise UserError(f"the last block of this base has no layer of the kind {' or '.join(roles)}", field="base",
                    expected="a base with linear layers")  # fmt: skip


def gradients_at(worker: Worker, pieces: list[Encoded], layer: Linear) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Give each piece's number, what went into a layer ``(length, inputs)`` and the gradient of the piece's summed loss in what came out of it
    ``(length, outputs)``, both fp32; the gradient of the layer's weight is the second's transpose times the first."""
    model = worker.base.model
    block = model.get_submodule(worker.base.anatomy.blocks[-1].prefix)
    groups = list(packs([len(piece.input_ids) for piece in pieces], worker.encoder.max_length))
    rows = [pack_in_order([pieces[member] for member in members]) for members in groups]
    met: dict[str, Tensor] = {}

    def begin(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs:
            return (inputs[0].detach().requires_grad_(True), *inputs[1:]), named
        return inputs, named | {"hidden_states": named["hidden_states"].detach().requires_grad_(True)}

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        met["in"] = inputs[0].detach()
        output.register_hook(lambda gradient: met.__setitem__("out", gradient.detach()))

    with ExitStack() as stack:
        stack.enter_context(worker.loss.attending(rows))
        stack.callback(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(model.get_submodule(layer.module).register_forward_hook(after).remove)
        for members, row in zip(groups, rows, strict=True):
            with torch.enable_grad():
                worker.loss(**{key: value[None] for key, value in row.items()}).backward()
            worker.meter.count(forward=len(row["input_ids"]), backward=len(row["input_ids"]) // len(worker.base.anatomy.blocks))
            inward, outward = (met[side].reshape(-1, met[side].shape[-1]).float() for side in ("in", "out"))
            if layer.outputs is not None:
                outward = outward[:, layer.outputs]
            ends = np.cumsum([len(pieces[member].input_ids) for member in members]).tolist()
            for member, start, end in zip(members, [0, *ends[:-1]], ends, strict=True):
                yield member, inward[start:end], outward[start:end]


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
        for member, inward, outward in gradients_at(worker, pieces, layer):
            side = self.input_side(inward.shape[1]).to(inward.device)
            gradient = outward.T @ (inward @ side.T)
            found[owners[member]] = found[owners[member]] + gradient if owners[member] in found else gradient
        norms = [float(found[number].norm()) / counts[number] if number in found else 0.0 for number in range(len(records))]
        return np.array(norms)

    def input_side(self, width: int) -> Tensor:
        """Return the adapter's input side, ``(rank, width)``."""
        generator = torch.Generator().manual_seed(0)
        return (torch.rand(self.rank, width, generator=generator) * 2 - 1) / math.sqrt(width)
