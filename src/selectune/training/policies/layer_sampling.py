"""A few blocks train at a time, drawn anew every few steps.

Knows: the draw, uniform or by measured importance. Does not know: how the rest is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from selectune.training.policies.policy import Stage
from selectune.training.policies.sampled import Sampled, by_block


class LayerSampling(Sampled):
    """Layerwise importance sampling (LISA): ``blocks`` blocks at a time, with embeddings and head."""

    name: ClassVar[str] = "layer_sampling"
    paper: ClassVar[str] = (
        "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning, NeurIPS 2024, arXiv 2403.17919"
    )
    summary: ClassVar[str] = "A few blocks train at a time, drawn anew every few steps."
    departs: ClassVar[str] = "`by: gradient_norm` and `by: fisher` draw by importance measured anew; the paper's draw is uniform."

    blocks: Annotated[int, Field(gt=0)] = 2
    """How many train at a time."""
    every: Annotated[int, Field(gt=0)] = 20
    """Steps between two draws."""
    outside: bool = True
    """Train what was chosen outside of blocks (embeddings, head, last norm) all the time; off: never."""
    by: Literal["uniform", "gradient_norm", "fisher"] = "uniform"
    """Probability of a block: the same for all, in proportion to the norm of its mean gradient, or to its mean squared gradient norm."""
    examples: Annotated[int, Field(gt=0)] = 8
    """Training sequences that importance is measured on, drawn anew each time."""

    def at_once(self, weights: Mapping[int | None, int]) -> int:
        if self.by != "uniform":  # importance asks for the gradients of all
            return super().at_once(weights)
        blocks = sorted((count for index, count in weights.items() if index is not None), reverse=True)
        return sum(blocks[: self.blocks]) + (weights.get(None, 0) if self.outside else 0)

    def due(self, stage: Stage) -> bool:
        return stage.step % self.every == 0

    def draw(self, stage: Stage) -> set[str]:
        found = by_block(stage)
        outside = found.pop(None, set()) if self.outside else set()
        present = sorted(index for index in found if index is not None)
        weights = torch.ones(len(present)) if self.by == "uniform" else self.importance(stage, present)
        count = min(self.blocks, len(present))
        drawn = torch.multinomial(weights, count, generator=stage.generator("blocks")).tolist() if count else []
        return outside.union(*(found[present[place]] for place in drawn))

    def importance(self, stage: Stage, present: list[int]) -> torch.Tensor:
        """Return the importance of each block that trains, ``(blocks,)`` fp32."""
        stage.train_only()
        means: dict[str, torch.Tensor] = {}
        squares = dict.fromkeys(present, 0.0)
        batches = stage.sample(self.examples, "importance")
        for batch in batches:
            for name, gradient in stage.gradient(batch).items():
                block = stage.block(name)
                if block is not None and self.by == "fisher":
                    squares[block] += float(gradient.pow(2).sum())
                elif block is not None:
                    means[name] = means[name].add_(gradient) if name in means else gradient
        for name, gradient in means.items():
            squares[stage.block(name) or 0] += float(gradient.pow(2).sum())
        found = torch.tensor([squares[block] for block in present]).clamp(min=1e-30)
        return (found if self.by == "fisher" else found.sqrt()) / len(batches)
