"""What a forward pass keeps for the backward pass, and which modules keep it.

Knows: how saved tensors are noted, each once, weights not counted, and which module was running when one was saved. A frozen module keeps
nothing that only its own weight's gradient would need, and what lies below everything that trains keeps nothing at all; this is where
it shows. After Lowering PyTorch's Memory Consumption for Selective Differentiation, 2024, arXiv 2404.12406.
Does not know: what memory there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selectune.data.packing import record_spans
from selectune.models.attention import attend_by_record
from selectune.models.gated import short_gated_units
from selectune.models.head import SplitModel
from selectune.models.norms import short_norms
from selectune.models.recomputed import recomputing
from selectune.training.allocator import give_back_freed_memory


def saved_bytes(
    split: SplitModel, rows: list[dict[str, Tensor]], batch_rows: list[dict[str, Tensor]], bfloat16: bool
) -> Counter[str]:
    """Return the bytes that a forward pass through the decoder keeps for the backward pass, by the module that keeps them.

    A tensor that several modules keep counts once, where it is kept first.

    Args:
        rows: all packed training sequences. batch_rows: those of the pass.
    """
    device = next(split.causal.parameters()).device
    own = {value.untyped_storage().data_ptr() for value in split.causal.parameters()}
    batch = {key: torch.stack([row[key] for row in batch_rows]).to(device) for key in ("input_ids", "position_ids", "labels")}
    kept: dict[int, tuple[str, int]] = {}
    running: list[str] = []

    def note(value: Tensor) -> None:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:  # it is kept alive, so that no address comes twice
            kept.setdefault(storage.data_ptr(), (running[-1] if running else "", storage.nbytes()))

    with (
        _training(split.causal),
        attend_by_record(split.causal, rows, bfloat16) as by_record,
        short_norms(split.causal),
        short_gated_units(split.causal),
        _named(split.causal, running),
    ):
        records = {"records": record_spans(batch["position_ids"], batch["labels"])} if by_record else {}
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autocast(device.type, torch.bfloat16, enabled=bfloat16),
            recomputing(note),
        ):
            hidden = split.hidden(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **records)
    del hidden
    give_back_freed_memory()
    found = Counter[str]()
    for name, size in kept.values():
        found[name] += size
    return found


def by_kind(found: Counter[str]) -> dict[str, int]:
    """Return bytes by the last part of the modules' names (``q_proj``, ``self_attn``), the most first."""
    kinds = Counter[str]()
    for name, size in found.items():
        parts = [part for part in name.split(".") if not part.isdigit() and part not in WRAPPERS]
        kinds[parts[-1] if parts else "model"] += size
    return {kind: size for kind, size in kinds.most_common() if size > 0}


WRAPPERS = {"base_layer", "default", "lora_A", "lora_B", "lora_dropout"}
"""Names of modules inside an adapter's layer, which speak of the layer."""


@contextmanager
def _named(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Within, the last of ``running`` is the name of the module whose forward pass is under way."""
    hooks: list[Any] = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: (running.pop(), None)[1], always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    """Within, a module is in training mode."""
    was = module.training
    module.train()
    try:
        yield
    finally:
        module.train(was)
