"""Several dropout passes over one batch say which weights to update, and with which gradient.

Knows: the passes, the mean and the spread of their gradients, the factors made of them. Does not know: how a mask is applied.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from selectune.training import processes
from selectune.training.policies.dropout import branches, dropping
from selectune.training.policies.masked import Masked, largest
from selectune.training.policies.policy import Batch, Stage


class BiDrop(Masked):
    """Updates, with the mean gradient of a few sub-networks, the entries on which they agree and that the gradient matters to."""

    name: ClassVar[str] = "bi_drop"
    paper: ClassVar[str] = (
        "Bi-Drop: Enhancing Fine-tuning Generalization via Synchronous sub-net Estimation and Optimization, "
        "Findings of EMNLP 2023, arXiv 2305.14760"
    )
    summary: ClassVar[str] = "Several dropout passes over each batch vote which weights are updated."
    departs: ClassVar[str] = (
        "Dropout is put on attention's and the MLP's outputs. The factors are each divided by their mean in the tensor and added; how the "
        "paper joins them, its threshold and its constants could not be checked."
    )
    changes_what_trains: ClassVar[bool] = True

    mask: Literal["gradient", "update"] = "update"
    """What is held back: the update, or the gradient (momentum then still moves the weight)."""
    passes: Annotated[int, Field(gt=0)] = 2
    """Sub-networks, each a dropout mask, for every batch."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the branches' outputs that is dropped."""
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of each tensor's entries that is updated."""
    scaling: bool = True
    """Count the gradient against the weight too, not only against its own spread."""

    @property
    def copies(self) -> int:  # type: ignore[override]
        """Beside the factors the gradient of each sub-network."""
        return super().copies + self.passes

    def begin(self, stage: Stage) -> None:
        stage.passing["branches"] = branches(stage.whole.causal)
        stage.passing["open"] = ExitStack()

    def before_step(self, stage: Stage) -> None:
        stage.passing["again"] = []

    def loss(self, stage: Stage, batch: Batch, plain: Callable[[], Tensor]) -> Tensor:
        number = len(stage.passing["again"])

        def dropped(sub_network: int) -> Tensor:
            source = stage.generator(f"{sub_network}/{number}/{processes.rank()}")
            stage.passing["open"].close()
            if self.dropout:  # until the next pass, as the backward pass may compute this one again
                stage.passing["open"].enter_context(dropping(stage.passing["branches"], self.dropout, source))
            return plain()

        stage.passing["again"].append(dropped)
        return dropped(0)

    def factors(self, stage: Stage) -> dict[str, Tensor]:
        if not self.dropout:  # sub-networks would differ by rounding alone
            return {}
        found = [{name: gradient.clone() for name, _, gradient in stage.gradients()}]
        for sub_network in range(1, self.passes):
            stage.clear()
            for dropped in stage.passing["again"]:
                with torch.enable_grad():
                    dropped(sub_network).backward()
            found.append({name: gradient.clone() for name, _, gradient in stage.gradients()})
        stage.passing["open"].close()
        factors = {}
        for name, value, gradient in stage.gradients():
            votes = torch.stack([one[name] for one in found])
            gradient.copy_(votes.mean(0))
            factors[name] = chosen(votes, value.detach(), self.keep, self.scaling)
        return factors


def chosen(votes: Tensor, weight: Tensor, keep: float, scaling: bool = True) -> Tensor:
    """Return 1 at the entries to update and 0 elsewhere; all of them where the sub-networks do not differ.

    Args:
        votes: ``(passes, ...)`` gradients. weight: ``(...)``.
    """
    mean = votes.mean(0)
    spread = (votes - mean).square_().mean(0).sqrt_()  # 17 times as fast as std along the first dimension
    mean = mean.abs_()
    if not spread.any():
        return torch.ones_like(weight)
    score = _relative(mean / spread.clamp(min=float(spread.mean()) * 1e-3))
    if scaling:
        score = score + _relative(mean / weight.abs().clamp(min=float(weight.abs().mean()) * 1e-3 + 1e-30))
    return largest(score, keep)


def _relative(factor: Tensor) -> Tensor:
    return factor / factor.mean().clamp(min=1e-30)
