"""FSLoRA's sketch as a regulariser: for some steps at a time, only some of the ranks of each low-rank adapter are there, and train.

Where k of r ranks are drawn, their share of the product is multiplied by r/k, so that on average it is the whole product. Ranks that were not
drawn stay as they are, bit for bit. Evaluation sees the whole product.
Knows: the draw and what is held still. Does not know: where factors lie (``low_rank.py``).
"""

from __future__ import annotations

import zlib
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from selectune.training.policies.low_rank import factors
from selectune.training.policies.policy import Policy, Stage


class FSLoRA(Policy):
    """Trains a drawn part of the ranks at a time."""

    name: ClassVar[str] = "fslora"
    paper: ClassVar[str] = (
        "Federated Sketching LoRA: A Flexible Framework for Heterogeneous Collaborative Fine-Tuning of LLMs, arXiv 2501.19389"
    )
    summary: ClassVar[str] = "On low-rank adapters: some of the ranks at a time are there and train, the others are held still."
    departs: ClassVar[str] = (
        "One worker instead of many: the sketch, not the averaging. It is applied between the factors, and both factors of a layer share it "
        "(the released script draws them apart, and its test of names never matches). One AdamW runs through all draws."
    )

    ranks: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the ranks that are drawn."""
    every: Annotated[int, Field(gt=0)] = 20
    """Steps between draws."""

    def begin(self, stage: Stage) -> None:
        sketches: dict[str, Tensor] = {}
        for name, one in factors(stage, self.name).items():
            sketches[name] = torch.ones(len(one.down), device=one.down.device)
            one.layer.lora_A["default"].register_forward_hook(_sketched(sketches, name))  # type: ignore[union-attr,index]
        stage.passing["sketches"] = sketches

    def before_step(self, stage: Stage) -> None:
        stage.passing["held"] = {}
        for name, one in factors(stage, self.name).items():
            drawn = sketch(len(one.down), self.ranks, self._source(stage, name)).to(one.down.device)
            stage.passing["sketches"][name] = drawn
            still = drawn == 0
            stage.passing["held"][name] = still, one.down.detach()[still].clone(), one.up.detach()[:, still].clone()

    def _source(self, stage: Stage, name: str) -> torch.Generator:
        """Return a source of random numbers that stays the same from draw to draw of the same steps."""
        return torch.Generator().manual_seed(zlib.crc32(f"{stage.seed}/{stage.step // self.every}/{name}".encode()))

    def after_step(self, stage: Stage) -> None:
        for name, one in factors(stage, self.name).items():  # momentum and weight decay would move them
            still, down, up = stage.passing["held"][name]
            one.down[still] = down
            one.up[:, still] = up


def sketch(rank: int, share: float, generator: torch.Generator) -> Tensor:
    """Return the sketch's diagonal, ``(rank,)``: rank / k at k drawn places, 0 elsewhere."""
    count = max(round(share * rank), 1)
    found = torch.zeros(rank)
    found[torch.randperm(rank, generator=generator)[:count]] = rank / count
    return found


def _sketched(sketches: dict[str, Tensor], name: str) -> Any:
    def hook(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        return output * sketches[name].to(output) if layer.training else None

    return hook
