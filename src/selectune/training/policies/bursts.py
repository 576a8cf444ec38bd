"""From time to time, what moved most is trained for a while on what should not be forgotten.

Knows: how far each tensor moved, the buffer, the burst. Does not know: the steps in between.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from selectune.data.packing import pack
from selectune.training.policies.policy import Batch, Policy, Stage


class Bursts(Policy):
    """k-FPF: every so many steps a burst on the tensors that changed most, on a small buffer of general and training records."""

    name: ClassVar[str] = "bursts"
    paper: ClassVar[str] = "Does Continual Learning Equally Forget All Parameters?, ICML 2023, arXiv 2304.04158"
    summary: ClassVar[str] = "Every so many steps, what moved most is trained for a moment on a small general buffer."
    departs: ClassVar[str] = (
        "Tensors are chosen by how far they moved since the last burst; the paper's comparison of changes between and within tasks needs several "
        "tasks. AdamW of its own in each burst, which is short by default, as are the general conversations that are built "
        "in (64). No distillation of stored logits."
    )
    copies: ClassVar[int] = 2

    every: Annotated[int, Field(gt=0)] = 100
    """Steps between two bursts."""
    steps: Annotated[int, Field(ge=0)] = 10
    """Steps in a burst; 0: plain training."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Entries that train in a burst, of all that train: tensors that moved most first, as many as fit; the first of them whatever its size."""
    buffer: Annotated[int, Field(gt=0)] = 64
    """General records in the buffer; as many training records beside them."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of a burst; left out: that of the step."""
    batch: Annotated[int, Field(gt=0)] = 4
    """Sequences in a step of a burst."""

    def begin(self, stage: Stage) -> None:
        stage.tensors = stage.values()

    def after_step(self, stage: Stage) -> None:
        if (stage.step + 1) % self.every or not self.steps:
            return
        names = most_moved({name: value.detach() for name, value in stage.parameters.items()}, stage.tensors, self.share)
        if names:  # at a learning rate of zero nothing moves
            self.burst(stage, names)
        stage.tensors = stage.values()

    def burst(self, stage: Stage, names: list[str]) -> None:
        """Train some tensors on the buffer."""
        rows, rate = self.rows(stage), self.learning_rate or stage.learning_rate
        optimiser = torch.optim.AdamW([stage.parameters[name] for name in names], lr=rate, weight_decay=0.0)
        for number in range(self.steps):
            order = torch.randperm(len(rows), generator=stage.generator(f"burst/{number}"))[: self.batch].tolist()
            stage.clear()
            for place in order:
                for name, gradient in stage.gradient(rows[place], names).items():
                    value = stage.parameters[name]
                    value.grad = gradient / len(order) if value.grad is None else value.grad.add_(gradient, alpha=1 / len(order))
            optimiser.step()
        stage.clear()

    def rows(self, stage: Stage) -> list[Batch]:
        """Return the buffer as batches of one sequence."""
        if "buffer" not in stage.passing:
            context = stage.context
            assert context is not None, "the buffer needs the records"
            both = [sorted(records, key=lambda record: record.key)[: self.buffer] for records in (context.general, context.train)]
            pieces = [piece for records in both for record in records for piece in context.encoder.encode(record)]
            rows = pack(pieces, context.encoder.max_length, True, context.base.tokenizer.pad_token_id)
            stage.passing["buffer"] = [{key: value[None].to(stage.device) for key, value in row.items()} for row in rows]
        found: list[Batch] = stage.passing["buffer"]
        return found


def most_moved(now: dict[str, Tensor], before: dict[str, Tensor], share: float) -> list[str]:
    """Return the tensors with the largest mean absolute change, as many as fit a share of all entries (the first in any case)."""
    moved = {name: float((value - before[name]).abs().mean()) for name, value in now.items()}
    room = share * sum(value.numel() for value in now.values())
    chosen: list[str] = []
    for name in sorted(moved, key=lambda name: (-moved[name], name)):
        if moved[name] > 0 and (not chosen or now[name].numel() <= room):
            chosen.append(name)
            room -= now[name].numel()
    return sorted(chosen)
