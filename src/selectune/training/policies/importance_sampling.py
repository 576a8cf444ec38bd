"""At each step a few blocks train; which ones is learnt by turning others down for a moment.

Knows: the scores of blocks, how they are learnt and drawn by. Does not know: how the rest is left out of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from selectune.training.policies.policy import Stage
from selectune.training.policies.sampled import Sampled, by_block


class ImportanceSampling(Sampled):
    """Importance-aware sparse tuning (IST), of adapters or of blocks in place."""

    name: ClassVar[str] = "importance_sampling"
    paper: ClassVar[str] = (
        "Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient Fine-tuning of Large Language Models, "
        "Findings of EMNLP 2024, arXiv 2410.11772"
    )
    summary: ClassVar[str] = "A quarter of the blocks trains at each step, those that are missed most when turned down."
    departs: ClassVar[str] = "In place, a block is turned down by shrinking its change from the base."
    copies: ClassVar[int] = 2
    remembers_on_cpu: ClassVar[bool] = True

    active: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the blocks that train at a step."""
    by: Literal["importance", "uniform"] = "importance"
    """By learnt scores, or all alike (the paper's control)."""
    every: Annotated[int, Field(gt=0)] = 10
    """Steps between two updates of the scores."""
    sets: Annotated[int, Field(gt=1)] = 3
    """Sets of blocks that are turned down at an update."""
    suppressed: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the blocks in a set."""
    strength: Annotated[float, Field(ge=0, le=1)] = 0.25
    """What is left of a block's change when it is turned down."""
    rate: Annotated[float, Field(gt=0)] = 10.0
    """Step size of the scores."""
    examples: Annotated[int, Field(gt=0)] = 16
    """Training sequences in a measurement."""

    def begin(self, stage: Stage) -> None:
        stage.passing["base"] = stage.values()

    def forgets(self) -> bool:
        return False

    def due(self, stage: Stage) -> bool:
        return True

    def draw(self, stage: Stage) -> set[str]:
        found = by_block(stage)
        outside = found.pop(None, set())
        present = sorted(index for index in found if index is not None)
        scores = stage.tensors.setdefault("scores", torch.zeros(len(present), dtype=torch.float64))
        if self.by == "importance" and stage.step and stage.step % self.every == 0:
            self.learn(stage, found, present, scores)
        weights = torch.sigmoid(-scores) if self.by == "importance" else torch.ones_like(scores)
        drawn = torch.multinomial(weights, max(1, int(self.active * len(present))), generator=stage.generator("active"))
        return outside.union(*(found[present[place]] for place in drawn.tolist()))

    def learn(self, stage: Stage, found: dict[int | None, set[str]], present: list[int], scores: Tensor) -> None:
        """Raise the scores of blocks that are missed less than others when turned down."""
        chance, source = torch.sigmoid(scores), stage.generator("suppressed")
        count = max(1, int(self.suppressed * len(present)))
        drawn = [torch.multinomial(chance, count, generator=source) for _ in range(self.sets)]
        batches = stage.sample(self.examples, "suppressed")
        losses = []
        stage.whole.eval()
        with torch.no_grad():
            for places in drawn:
                with self.turned_down(stage, {present[place] for place in places.tolist()}, found):
                    losses.append(sum(float(stage.mean_loss(batch)) for batch in batches) / len(batches))
        stage.whole.train()
        learnt(scores, drawn, torch.tensor(losses, dtype=torch.float64), self.rate)

    @contextmanager
    def turned_down(self, stage: Stage, blocks: set[int], found: dict[int | None, set[str]]) -> Iterator[None]:
        """Within, the change of these blocks from the base is smaller."""
        scaled = [
            (module.scaling, key, module.scaling[key])
            for block in blocks
            for module in _layers(stage, block)
            for key in getattr(module, "active_adapters", [])
        ]
        adapted = bool(scaled)
        kept = {} if adapted else {name: stage.parameters[name].detach().clone() for block in blocks for name in found[block]}
        for scaling, key, value in scaled:
            scaling[key] = value * self.strength
        for name in kept:
            stage.parameters[name].data.copy_(torch.lerp(stage.passing["base"][name], kept[name], self.strength))
        try:
            yield
        finally:
            for scaling, key, value in scaled:
                scaling[key] = value
            for name, value in kept.items():
                stage.parameters[name].data.copy_(value)


def learnt(scores: Tensor, sets: list[Tensor], losses: Tensor, rate: float) -> None:
    """Update the scores in place, all from what they were before.

    Args:
        scores: ``(blocks,)``. sets: of each measurement, the blocks that were turned down, ``(n,)`` int64. losses: ``(sets,)``.
    """
    chance = torch.sigmoid(scores)
    rewards = torch.exp(-losses)
    for places, advantage in zip(sets, (rewards - rewards.mean()).tolist(), strict=True):
        scores[places] += advantage * (chance * (1 - chance))[places] * rate


def _layers(stage: Stage, block: int) -> list[Any]:
    """Adapter layers of a block."""
    module = stage.whole.causal.get_submodule(stage.anatomy.blocks[block].prefix)
    return [layer for layer in module.modules() if isinstance(getattr(layer, "scaling", None), dict)]
