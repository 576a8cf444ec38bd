"""A random half of the matrices trains at a time, drawn anew each epoch.

Knows: when a half is drawn. Does not know: what makes a half (``parameters/half.py``), or how the rest is left out of a step.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from selectune.parameters.half import draw
from selectune.training.policies.policy import Stage
from selectune.training.policies.sampled import Sampled


class Half(Sampled):
    """Half fine-tuning: 2 of 4 attention matrices, 1 or 2 of 3 of the MLP, 1 of 2 norms of every block."""

    name: ClassVar[str] = "half"
    paper: ClassVar[str] = "HFT: Half Fine-Tuning for Large Language Models, ACL 2025, arXiv 2404.18466"
    summary: ClassVar[str] = "A random half of the matrices trains at a time, drawn anew each epoch."
    departs: ClassVar[str] = (
        "Drawn anew within a run, each epoch (the paper: each stage of training; a draw for a whole run is a choice of parameters), "
        "among all matrices: what was not chosen to train stays out. An adapter is drawn with its matrix."
    )

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of each category that trains."""
    level: Literal["category", "model", "layer"] = "category"
    """Drawn within each block and category, among all matrices, or as whole blocks."""
    every: Annotated[int, Field(gt=0)] | None = None
    """Steps between two draws; left out: an epoch."""
    outside: bool = True
    """Train what was chosen outside of blocks (embeddings, head) all the time, as in the paper; off: never."""

    def due(self, stage: Stage) -> bool:
        if self.every is not None:
            return stage.step % self.every == 0
        return bool(stage.numbers.get("epoch") != stage.epoch)

    def draw(self, stage: Stage) -> set[str]:
        stage.numbers["epoch"] = stage.epoch
        drawn = set(draw(stage.anatomy, stage.generator("half"), level=self.level, ratio=self.share))
        return {name for name in stage.parameters if (self.outside if stage.block(name) is None else name in drawn)}
