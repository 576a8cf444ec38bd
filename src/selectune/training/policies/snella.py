"""SNELLA's competition: matrices with the form ``snella`` share a budget of entries that may change, which falls while they train.

A matrix's share follows the sensitivity of its factors, smoothed, times how much that sensitivity varies.
Knows: the sensitivities, the schedule and the sharing. Does not know: how a matrix uses its share (``adapters/snella.py``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from selectune.errors import UserError
from selectune.parameters.factors.allocation import apportion
from selectune.training.policies.policy import Policy, Stage
from selectune.training.policies.roselora import density_at


class SNELLACompetition(Policy):
    """Shares out, step by step, how many entries of each matrix may change."""

    name: ClassVar[str] = "snella"
    paper: ClassVar[str] = "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models, arXiv 2510.24037"
    summary: ClassVar[str] = (
        "For the form `snella`: matrices compete for the entries that may change, by the sensitivity of their factors."
    )
    departs: ClassVar[str] = (
        "Shares are whole numbers by largest remainders; the warm-ups are a tenth and four tenths of the run."
    )
    keeps_last: ClassVar[bool] = True

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """Share of all matrices together that does not change, at the end; none at the start."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.85
    """Of the sensitivity and of its variation, the share of what it was before."""
    every: Annotated[int, Field(gt=0)] = 1
    """Steps between sharings."""

    def begin(self, stage: Stage) -> None:
        from selectune.adapters.attached import attachments
        from selectune.adapters.snella import KernelChange

        found = {name: one for name, one in attachments(stage.whole.causal).items() if isinstance(one, KernelChange)}
        if not found:
            raise UserError(
                "'snella' acts on matrices of the form 'snella', and there are none", field="policy", expected="form: snella"
            )
        stage.passing["matrices"] = found

    def gradients(self, stage: Stage) -> None:
        with torch.no_grad():
            for name, one in stage.passing["matrices"].items():
                for key, value in (("rows", one.rows), ("columns", one.columns)):
                    now = (value * (0 if value.grad is None else value.grad)).abs().nan_to_num()
                    kept = stage.tensors.setdefault(f"{name}.{key}.mean", torch.zeros_like(now))
                    spread = stage.tensors.setdefault(f"{name}.{key}.spread", torch.zeros_like(now))
                    kept.lerp_(now, 1 - self.smoothing)
                    spread.lerp_((now - kept).abs(), 1 - self.smoothing)

    def after_step(self, stage: Stage) -> None:
        matrices = stage.passing["matrices"]
        end = min(0.6 * stage.steps, stage.steps - 1)
        if stage.step % self.every and stage.step < end:
            return
        sizes = [one.rows.shape[1] * one.columns.shape[1] for one in matrices.values()]
        scores = []
        for name in matrices:
            both = [stage.tensors[f"{name}.{key}.mean"] * stage.tensors[f"{name}.{key}.spread"] for key in ("rows", "columns")]
            scores.append(both[0].mean() + both[1].mean())
        share = density_at(stage.step, min(0.1 * stage.steps, end), end, 1 - self.sparsity)
        counts = apportion(round(share * sum(sizes)), torch.stack(scores).tolist(), sizes)
        for one, count in zip(matrices.values(), counts, strict=True):
            one.nonzeros.fill_(count)
        stage.numbers = dict(zip(matrices, counts, strict=True))

    def restore(self, stage: Stage, tensors: dict[str, torch.Tensor], numbers: dict[str, int]) -> None:
        super().restore(stage, tensors, numbers)
        for name, count in numbers.items():
            stage.passing["matrices"][name].nonzeros.fill_(count)
