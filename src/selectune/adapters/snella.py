"""SNELLA: a sparse change of each matrix, made of two thin factors through a kernel that is not linear.

An entry of the change is a function of the distance between a row's and a column's vector, so its rank is not that of the factors. Of each matrix
only the largest kernel values count; the change is that of their value since the start, times their size, and zero everywhere else. By the policy
``snella`` the matrices compete for how many that are.
Knows: the kernel, the sparsity within a matrix, and how the change is merged. Does not know: which matrices were chosen, or the competition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selectune.adapters.attached import AttachedForm, Attachment, Settings, is_transposed
from selectune.adapters.lora import whole_layers
from selectune.parameters.factors.allocation import best
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base


class SNELLA(AttachedForm):
    """A kernelised sparse change beside each linear layer of the chosen blocks."""

    name: ClassVar[str] = "snella"
    paper: ClassVar[str] = (
        "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models, arXiv 2510.24037; its predecessor NeurIPS 2024, "
        "arXiv 2411.01800"
    )
    summary: ClassVar[str] = (
        "A sparse change of each matrix, made of two thin factors through a kernel; the policy `snella` shares out sparsity."
    )
    departs: ClassVar[str] = (
        "What the kernel gives at the start is subtracted on the entries that count, so that training starts at the base. The softmax of the "
        "kernel runs over a row's columns. No drop path; no average of the weights over time."
    )
    learning_rate_default: ClassVar[float] = 5e-4

    rank: Annotated[int, Field(ge=2, multiple_of=2)] = 16
    """Width of the factors, both halves together."""
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """Share of each matrix that does not change."""

    def places(self, base: Base, selection: Selection) -> dict[str, Settings]:
        return {name: {} for name in whole_layers(base, selection, self.name)}

    def build(self, layer: Any, settings: Settings, seed: int) -> Attachment:
        outputs, inputs = layer.weight.shape[::-1] if is_transposed(layer) else layer.weight.shape
        return KernelChange(outputs, inputs, self.rank, self.sparsity, torch.Generator().manual_seed(seed))


class KernelChange(Attachment):
    """Adds ``change @ x``, ``change`` of ``(outputs, inputs)`` made anew in each pass, and again in the backward pass."""

    def __init__(self, outputs: int, inputs: int, rank: int, sparsity: float, generator: torch.Generator) -> None:
        super().__init__()
        scale = rank**-0.5
        self.rows = nn.Parameter(scale * torch.randn(2, outputs, rank // 2, generator=generator))
        self.columns = nn.Parameter(scale * torch.randn(2, inputs, rank // 2, generator=generator))
        self.mix = nn.Parameter(torch.tensor([1.0, 1.0, 0.0]))
        """Factor of the softmax, its temperature, and what is added."""
        for name in ("rows", "columns", "mix"):
            self.register_buffer(f"first_{name}", getattr(self, name).detach().clone())
        self.register_buffer("nonzeros", torch.tensor(outputs * inputs - int(sparsity * outputs * inputs)))

    def change(self) -> Tensor:
        """Return the change of the weight, ``(outputs, inputs)`` fp32: exactly ``nonzeros`` entries count, the others are zero."""
        with torch.autocast(self.rows.device.type, enabled=False):  # which would round the products to bf16
            now = kernel(self.rows, self.columns, self.mix)
            with torch.no_grad():
                first = kernel(self.first_rows, self.first_columns, self.first_mix)  # type: ignore[arg-type]
        with torch.no_grad():
            sizes = now.abs()
            mask = torch.zeros(now.numel(), device=now.device)
            mask[best(sizes.view(-1), int(self.nonzeros)).to(now.device)] = 1.0  # type: ignore[arg-type]
            mask = mask.view_as(now)
            first = first * first.abs() * mask
        return now * (sizes * mask) - first

    def _add(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.change().to(states.dtype))

    def after(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        added: Any = checkpoint(self._add, inputs[0], use_reentrant=False)
        return output + added.to(output.dtype)

    def fold(self, layer: Any) -> Tensor | None:
        change = self.change().t() if is_transposed(layer) else self.change()
        layer.weight.copy_(layer.weight.float() + change)
        return None


def kernel(rows: Tensor, columns: Tensor, mix: Tensor) -> Tensor:
    """Return ``D + mix[0] softmax(D / mix[1]) + mix[2]``, D the difference of two distances between rows and columns times 0.1.

    Args:
        rows: ``(2, outputs, width)``. columns: ``(2, inputs, width)``. mix: ``(3,)``.
    """
    squares = rows.square().sum(-1)[:, :, None] + columns.square().sum(-1)[:, None, :] - 2 * rows @ columns.transpose(1, 2)
    distances = squares.clamp(min=1e-12).sqrt()  # at distance zero the root has no gradient
    difference = 0.1 * (distances[0] - distances[1])
    return difference + mix[0] * (difference / mix[1]).softmax(-1) + mix[2]
