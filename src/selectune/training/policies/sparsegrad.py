"""SparseGrad: gradients of the MLP are turned into a basis in which few entries hold most of them, and only these step.

Knows: the two bases of each role (gate, up, down), shared by all blocks, from a bank of gradients; the turned gradient's largest entries; Adam
on them alone, with moments in the turned basis; the way back. The weights stay as they are, and the gradient and the update are turned: the same
as training turned weights, at a few products a step instead of a few a token.
Does not know: anything of other parameters, which the run's optimiser steps.

The changed entries are few in the turned basis only: the weights change everywhere.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.parameters.factors.allocation import best
from selectune.parameters.factors.gradients import each_gradient, first, rows_of
from selectune.parameters.factors.targets import MLP
from selectune.training.policies.policy import Policy, Stage

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


class SparseGrad(Policy):
    """Steps whole matrices of the MLP by the largest entries of their gradients in a basis made for it."""

    name: ClassVar[str] = "sparsegrad"
    paper: ClassVar[str] = "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers, EMNLP 2024, arXiv 2410.07383"
    summary: ClassVar[str] = "Steps the MLP by the few largest entries of its gradient in a basis where it is sparse."
    departs: ClassVar[str] = (
        "The gradient and the update are turned once a step, instead of the weights and every token. The bank holds gradients at the base's "
        "weights instead of those of some first steps. Entries are the largest in size (one released variant drops negative ones). These "
        "gradients are not clipped, and there is no weight decay on them. Adam's moments are as large as the matrix, with betas of 0.9 and 0.999, "
        "whatever `training` says."
    )
    copies: ClassVar[int] = 2
    """The update beside the gradients; moments are as large as the optimiser's, which has none of these."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the entries of each turned gradient that steps."""
    examples: Annotated[int, Field(gt=0)] = 32
    """Training records in the bank, the first by hash of their content; each gives a gradient of every matrix."""
    optimiser: Literal["adam", "sgd"] = "adam"
    """How the kept entries step: with Adam's moments in the turned basis, or by the gradient itself."""

    def begin(self, stage: Stage) -> None:
        roles = self._roles(stage)
        if not roles:
            raise UserError("no matrix of the MLP trains whole, and nothing else can be turned", field="policy",
                            expected="form `full` and whole blocks or matrices")  # fmt: skip
        bank: dict[str, tuple[Tensor, Tensor]] = {}

        def add(name: str, gradient: Tensor, tokens: int) -> None:
            gradient = gradient / max(tokens, 1)
            left, right = gradient @ gradient.t(), gradient.t() @ gradient
            role = roles[name]
            bank[role] = (bank[role][0] + left, bank[role][1] + right) if role in bank else (left, right)

        context: Any = stage.context
        rows = rows_of(context, first(context.train, self.examples))
        each_gradient(stage.whole.causal, rows, roles, add, meter=stage.meter, bfloat16=stage.whole._in_bfloat16, quiet=True)
        for role, (left, right) in bank.items():
            stage.tensors[f"left/{role}"], stage.tensors[f"right/{role}"] = directions(left), directions(right)

    def gradients(self, stage: Stage) -> None:
        updates = stage.passing["sparsegrad"] = {}
        for name, role in self._roles(stage).items():
            gradient = stage.parameters[name].grad
            if gradient is None:
                continue
            left, right = (stage.tensors[f"{side}/{role}"].to(gradient) for side in ("left", "right"))
            turned = left.t() @ gradient @ right
            flat = turned.reshape(-1)
            index = best(flat.abs(), max(1, round(self.share * flat.numel())))
            step = torch.zeros_like(flat)
            step[index] = self._step(stage, name, flat[index], index)
            updates[name] = left @ step.view_as(turned) @ right.t()
        stage.drop(set(updates))

    def _step(self, stage: Stage, name: str, kept: Tensor, index: Tensor) -> Tensor:
        """Return what the kept entries move by, at a learning rate of 1, and bring their moments up to date."""
        if self.optimiser == "sgd":
            return kept
        size = stage.parameters[name].numel()
        mean, square = (
            stage.tensors.setdefault(f"{which}/{name}", torch.zeros(size, device=kept.device)) for which in ("mean", "square")
        )
        number = stage.numbers[name] = stage.numbers.get(name, 0) + 1
        mean[index] = torch.lerp(kept, mean[index], _BETAS[0])
        square[index] = torch.lerp(kept.square(), square[index], _BETAS[1])
        scale = (1 - _BETAS[1] ** number) ** 0.5 / (1 - _BETAS[0] ** number)
        return (scale * mean[index] / (square[index].sqrt() + _EPSILON)).to(kept)

    def after_step(self, stage: Stage) -> None:
        for name, update in stage.passing.pop("sparsegrad", {}).items():
            stage.parameters[name].data.sub_(update, alpha=stage.learning_rate)

    @staticmethod
    def _roles(stage: Stage) -> dict[str, str]:
        """Return the matrices of the MLP that train whole, each with its role and shape: what turns them alike."""
        found = {}
        for block in stage.anatomy.blocks:
            for layer, role in block.linears.items():
                value = stage.parameters.get(f"{layer}.weight")
                if role in MLP and value is not None and value.dim() == 2 and f"{layer}.weight" not in stage.parts:
                    found[f"{layer}.weight"] = f"{role}/{value.shape[0]}x{value.shape[1]}"  # beside experts some are wider
        return found


def directions(moment: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix as columns, the largest eigenvalue first; computed in fp64."""
    _, vectors = torch.linalg.eigh(moment.double())
    return vectors.flip(1).to(moment.dtype).contiguous()


def concentration(gradient: Tensor, mass: float = 0.9) -> float:
    """Return the share of the entries, the largest, that hold so much of the sum of squares: what turning is meant to bring down."""
    squares = gradient.double().square().reshape(-1).sort(descending=True).values.cumsum(0)
    return float((squares < mass * squares[-1]).sum() + 1) / len(squares)
