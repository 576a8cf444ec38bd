"""What every objective has in common.

Knows: that a loss is a sum over response tokens, computed from hidden states through the head, a chunk at a time, so that
the logits of a whole batch never exist at once. Does not know: the formula, which is the objective's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from selectune.catalogue import Method

CHUNK = 512  # positions that meet the vocabulary at once: 100 MB of fp32 logits at 49,152 entries


class Objective(Method, ABC):
    """A loss on next-token predictions."""

    axis: ClassVar[str] = "objectives"

    @abstractmethod
    def from_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the losses of ``(positions, vocabulary)`` logits and ``(positions,)`` labels, in fp32."""

    def total(self, head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the losses over the positions whose next token has a label.

        Args:
            head: hidden states to logits.
            hidden: ``(batch, length, hidden size)``.
            labels: ``(batch, length)`` int64, -100 where nothing is learnt; shifted here, not by the caller.
        """
        next_labels = labels[:, 1:].reshape(-1)
        kept = (next_labels != -100).nonzero().squeeze(-1)
        states = hidden[:, :-1].reshape(-1, hidden.shape[-1])[kept]
        targets = next_labels[kept]

        def part(states: Tensor, targets: Tensor) -> Tensor:
            return self.from_logits(head(states).float(), targets)

        if len(targets) <= CHUNK:
            return part(states, targets)
        sums = [
            checkpoint(part, *pair, use_reentrant=False) if torch.is_grad_enabled() else part(*pair)
            for pair in zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
        ]
        return torch.stack(sums).sum()
