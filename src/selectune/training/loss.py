"""From packed sequences to a loss: one module, so that whatever wraps modules (data parallelism, sharding) can wrap it.

Knows: the way through the decoder (records attend by themselves, the frozen beginning is remembered), the head on the positions that
count, and the reference that some objectives compare with. Does not know: optimisers, steps, or where sequences come from.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from selectune.data.packing import record_spans
from selectune.models.attention import attend_by_record
from selectune.models.gated import short_gated_units
from selectune.models.head import SplitModel
from selectune.models.norms import short_norms
from selectune.models.recomputed import recomputing
from selectune.objectives.objective import Objective
from selectune.training.prefix import PrefixCache


class LossOfModel(nn.Module):
    """A model that returns the sum of the losses of a batch.

    Args:
        model: a causal model, or a PEFT model around one. objective: its loss. bfloat16: compute in bf16 by autocast.
    """

    def __init__(self, model: Any, objective: Objective, bfloat16: bool) -> None:
        super().__init__()
        self.model, self.objective, self._in_bfloat16 = model, objective, bfloat16
        self.split = SplitModel(model)
        self.prefix: PrefixCache | None = None
        self.by_record = False
        if bfloat16:  # autocast casts an adapter's weights to its input's dtype, and PEFT the input to the weights'
            for layer in model.modules():
                if hasattr(layer, "cast_input_dtype_enabled"):
                    layer.cast_input_dtype_enabled = False
        self._reference = None
        if objective.needs_reference and not hasattr(model, "disable_adapter"):
            base = copy.deepcopy(self.split.causal).requires_grad_(False)
            self._reference = SplitModel(base.to(torch.bfloat16) if bfloat16 else base)

    @property
    def causal(self) -> Any:
        """The transformers model, without adapters around it."""
        return self.split.causal

    @property
    def config(self) -> Any:
        """The model's configuration, for what reads it off a module."""
        return self.model.config

    @property
    def _no_split_modules(self) -> list[str]:
        return list(self.causal._no_split_modules or [])

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass."""
        self.model.gradient_checkpointing_enable(**options)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether they are."""
        name = "is_activation_checkpointing"  # called is_gradient_checkpointing by older transformers
        return bool(getattr(self.causal, name if hasattr(type(self.causal), name) else "is_gradient_checkpointing"))

    @contextmanager
    def attending(self, rows: list[dict[str, Tensor]]) -> Iterator[None]:
        """Within, records attend by themselves, norms and gated units are short, where that gives what the model's own give."""
        own = attend_by_record(self.causal, rows, self._in_bfloat16)
        with own as self.by_record, short_norms(self.causal), short_gated_units(self.causal):
            try:
                yield
            finally:
                self.by_record = False

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, weights: Tensor | None = None, row: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum of the losses of a batch.

        Args:
            input_ids, position_ids, labels: ``(batch, length)`` int64. weights: of the tokens in ``labels``, the same shape.
            row: ``(batch,)`` numbers of the sequences, for what is remembered of each.
        """
        inputs = self._inputs(input_ids, position_ids, labels)
        with self.autocast():
            reference = self._ask_reference(inputs) if self.objective.needs_reference else None
            hidden = self._hidden(inputs, row)
            return self.objective.loss(self.split.logits, hidden, labels, weights, reference, self.split.head_parameters()).total

    def states(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, weights: Tensor | None = None, row: Tensor | None = None
    ) -> Tensor:
        """Return the last hidden states of a batch, ``(batch, length, hidden size)``; the vocabulary is not met."""
        with self.autocast():
            return self._hidden(self._inputs(input_ids, position_ids, labels), row)

    def autocast(self) -> Any:
        """Return the precision that the model computes in, as a context."""
        return torch.autocast(next(self.parameters()).device.type, torch.bfloat16, enabled=self._in_bfloat16)

    def _inputs(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> dict[str, Any]:
        records = {"records": record_spans(position_ids, labels)} if self.by_record else {}
        return {"input_ids": input_ids, "position_ids": position_ids, **records}

    def _hidden(self, inputs: dict[str, Any], row: Tensor | None) -> Tensor:
        remembered = self.prefix.batch(row) if self.prefix is not None and row is not None else nullcontext()
        with remembered, nullcontext() if self.is_activation_checkpointing else recomputing():
            return self.split.hidden(**inputs)

    @torch.no_grad()
    def _ask_reference(self, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
        """Return the head and the hidden states of the base: a frozen copy, or the model with its adapters off."""
        if self._reference is not None:
            return self._reference.logits, self._reference.hidden(**inputs)
        with self.model.disable_adapter():
            return self._plain_head, self.split.hidden(**inputs)

    def _plain_head(self, hidden: Tensor) -> Tensor:
        with self.model.disable_adapter():
            return self.split.logits(hidden)
