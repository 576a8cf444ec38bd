"""The frozen beginning of a model is computed once for each packed sequence.

Knows: which blocks lie below everything that trains, whether what comes out of them can change (dropout, noise), and where
the hidden states that enter the first other block are kept: in memory up to a limit, beyond it in a memory-mapped file.
Does not know: losses, optimisers, or where sequences come from. A cache lives as long as one training process; nothing that
could change its contents outlives it.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from selectune.models.anatomy import Anatomy

MEMORY_SHARE = 0.25
"""Of the free memory, at most this share is used before a file is."""


def frozen_blocks(model: Any) -> tuple[list[nn.Module], int]:
    """Return a causal model's blocks, and how many of the first lie below everything that trains.

    Zero where the same tokens need not give the same states: an embedding trains, or dropout is on there.
    """
    anatomy = Anatomy.of(model)
    blocks = [model.get_submodule(block.prefix) for block in anatomy.blocks]
    inside = {id(module) for block in blocks for module in block.modules()}
    before = [module for module in model.modules() if id(module) not in inside]
    if any(_changes(module) for module in before):
        return blocks, 0
    entries = [model.get_submodule(name.rpartition(".")[0]) for name in anatomy.embeddings]
    if any(value.requires_grad for module in entries for value in module.parameters()):
        return blocks, 0
    frozen = 0
    for block in blocks:
        if any(value.requires_grad for value in block.parameters()) or any(map(_changes, block.modules())):
            break
        frozen += 1
    return blocks, min(frozen, len(blocks) - 1)


def _changes(module: nn.Module) -> bool:
    """Whether a module gives other outputs for the same inputs: dropout, as a module or in attention."""
    share = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
    return isinstance(share, float) and share > 0


class PrefixCache:
    """Keeps the hidden states that enter the first block which is not frozen.

    Args:
        blocks: the transformer blocks. frozen: how many of the first are skipped once a batch is known.
        rows: sequences there are. batch: sequences in a forward pass; smaller passes (the last of an epoch) are computed as ever,
            since a product of another size may round otherwise.
        folder: for the file, when memory does not suffice; a temporary folder when left out.
        limit_bytes: the most memory; a share of what is free when left out.
        file_limit_bytes: the most disk; sequences beyond it are computed every time.
        shared: a folder in which several processes on one machine keep the states together.
    """

    def __init__(
        self, blocks: list[nn.Module], frozen: int, rows: int, batch: int, folder: Path | None = None,
        limit_bytes: int | None = None, file_limit_bytes: int = 16 << 30, shared: Path | None = None,
    ) -> None:  # fmt: skip
        self._blocks, self._frozen, self._rows, self._batch = blocks, frozen, rows, batch
        self._shared = shared
        self._known = torch.zeros(rows, dtype=torch.bool)
        if shared is not None:
            self._known = torch.from_file(str(shared / "known.bin"), shared=True, size=rows, dtype=torch.bool)
        self._limit = int(psutil.virtual_memory().available * MEMORY_SHARE) if limit_bytes is None else limit_bytes
        self._file_limit, self._folder = file_limit_bytes, folder
        self._states: Tensor | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.skipped_tokens = 0
        """Tokens that did not go through the frozen blocks."""

    @contextlib.contextmanager
    def batch(self, rows: Tensor) -> Iterator[None]:
        """Within, a forward pass over these sequences skips the frozen blocks if all are known, and else remembers them.

        Args:
            rows: ``(batch,)`` int64, numbers of the sequences, in the order in which they go through the model.
        """
        rows = rows.cpu()
        if len(rows) != self._batch:
            yield
            return
        known = bool((rows < len(self._known)).all()) and bool(self._known[rows].all())
        first = self._blocks[self._frozen]
        if known:
            hook = first.register_forward_pre_hook(lambda module, inputs: self._give(rows, inputs))
        else:
            hook = first.register_forward_pre_hook(lambda module, inputs: self._keep(rows, inputs))
        try:
            with passed_over(self._blocks[: self._frozen] if known else []):
                yield
        finally:
            hook.remove()

    def _give(self, rows: Tensor, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self._states is not None
        self.skipped_tokens += inputs[0].shape[:-1].numel()
        return (self._states[rows].to(inputs[0].device), *inputs[1:])

    def _keep(self, rows: Tensor, inputs: tuple[Any, ...]) -> None:
        hidden = inputs[0].detach()
        if self._states is None:
            self._states = self._room(tuple(hidden.shape[1:]), hidden.dtype)
        room = rows < len(self._states)
        if hidden.shape[1:] == self._states.shape[1:]:
            self._states[rows[room]] = hidden[room.to(hidden.device)].to(self._states.device)
            self._known[rows[room]] = True

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        each = math.prod(shape) * dtype.itemsize
        if self._shared is not None:
            return self._file(self._shared / "states.bin", min(self._rows, max(self._file_limit // each, 1)), shape, dtype)
        if each * self._rows <= self._limit:
            return torch.empty((self._rows, *shape), dtype=dtype)
        count = min(self._rows, max(self._file_limit // each, 1))
        self._temporary = tempfile.TemporaryDirectory(dir=self._folder, prefix="prefix-")
        return self._file(Path(self._temporary.name) / "states.bin", count, shape, dtype)

    @staticmethod
    def _file(file: Path, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.from_file(str(file), shared=True, size=count * math.prod(shape), dtype=dtype).view(count, *shape)

    def close(self) -> None:
        """Let the memory and the file go."""
        self._states = None
        self._known = torch.zeros(self._rows, dtype=torch.bool)
        if self._shared is not None:
            shutil.rmtree(self._shared, ignore_errors=True)
        if self._temporary is not None:
            self._temporary.cleanup()


@contextlib.contextmanager
def passed_over(blocks: list[nn.Module]) -> Iterator[None]:
    """Within, these blocks compute nothing: what enters them comes out of them."""
    for block in blocks:
        block.forward = _pass_on  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states
