"""Breadth first: every record once an epoch, no update for a batch that is known already, and an end when an epoch was.

Knows: what a batch's loss is, when it is low enough to leave the weights alone, when training ends. Does not know: which weights train, or how an
epoch is shuffled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from selectune.training.policies.policy import Batch, Policy, Stage


class BreadthFirst(Policy):
    """Leaves out updates for batches of a low loss, and ends after an epoch of a low loss."""

    name: ClassVar[str] = "breadth_first"
    paper: ClassVar[str] = "Fine-tuning Done Right in Model Editing, ICLR 2026, arXiv 2509.22072; code: ICT-STAR/LocFT"
    summary: ClassVar[str] = "For new facts: batches that are known are passed over, and training ends when all are (LocFT-BF)."
    departs: ClassVar[str] = "A batch's loss is the mean over its response tokens; the paper's is the mean over its facts."

    enough: Annotated[float, Field(ge=0)] = 0.01
    """Loss in nats per response token below which a batch is known; 0: plain training."""

    def before_step(self, stage: Stage) -> None:
        stage.passing["loss"] = torch.zeros(())
        if stage.numbers.setdefault("epoch", stage.epoch) != stage.epoch:
            stage.numbers |= {"epoch": stage.epoch, "losses": []}

    def loss(self, stage: Stage, batch: Batch, plain: Callable[[], Tensor]) -> Tensor:
        found = plain()
        stage.passing["loss"] = stage.passing["loss"] + found.detach().float()
        return found

    def gradients(self, stage: Stage) -> None:
        loss = float(stage.mean(stage.passing.pop("loss")))
        stage.numbers.setdefault("losses", []).append((loss, float(stage.tokens)))
        if loss < self.enough or stage.numbers.get("done"):
            stage.clear()

    def done(self, stage: Stage) -> bool:
        stage.numbers["done"] = stage.numbers.get("done", False) or mean(stage.numbers["losses"]) < self.enough
        return bool(stage.numbers["done"])


def mean(losses: list[tuple[float, float]]) -> float:
    """Return the mean over tokens, given each batch's mean and its number of tokens."""
    return sum(loss * tokens for loss, tokens in losses) / max(sum(tokens for _, tokens in losses), 1)
