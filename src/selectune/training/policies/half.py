"""A random half of the matrices trains at a time, drawn anew each epoch.

Knows: how many of a block's attention matrices, MLP matrices and norms make a half. Does not know: how the rest is left out of a step.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from selectune.models.anatomy import Block
from selectune.parameters.factors.targets import ATTENTION
from selectune.training.policies.policy import Stage
from selectune.training.policies.sampled import Sampled


class Half(Sampled):
    """Half fine-tuning: 2 of 4 attention matrices, 1 or 2 of 3 of the MLP, 1 of 2 norms of every block."""

    name: ClassVar[str] = "half"
    paper: ClassVar[str] = "HFT: Half Fine-Tuning for Large Language Models, ACL 2025, arXiv 2404.18466"
    summary: ClassVar[str] = "A random half of the matrices trains at a time, drawn anew each epoch."
    departs: ClassVar[str] = (
        "Drawn anew within a run, each epoch (the paper: each stage of training; a draw for a whole run is a choice of parameters). Other "
        "shares than a half keep the rule: the same number in each block, one more in as many blocks as make up the share."
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
        source, trained = stage.generator("half"), set(stage.parameters)
        active = {name for name in trained if self.outside and stage.block(name) is None}
        for groups in self._kinds(stage):
            present = [[unit & trained for unit in group if unit & trained] for group in groups]
            for group, count in zip(present, self._counts([len(group) for group in present], source), strict=True):
                for place in torch.randperm(len(group), generator=source)[:count].tolist():
                    active |= group[place]
        return active

    def _kinds(self, stage: Stage) -> list[list[list[set[str]]]]:
        """Kinds of things; of each the groups that a share is drawn from; of each the units that stay together."""
        blocks = [categories(block) for block in stage.anatomy.blocks]
        if self.level == "category":
            return [[groups[kind] for groups in blocks] for kind in range(3)]
        if self.level == "model":
            return [[[unit for groups in blocks for group in groups for unit in group]]]
        return [[[set[str]().union(*(unit for group in groups for unit in group)) for groups in blocks]]]

    def _counts(self, sizes: list[int], source: torch.Generator) -> list[int]:
        """How many units of each group: rounded down, and up in as many groups of one size as make up the share."""
        counts = [0] * len(sizes)
        for size in sorted(set(sizes)):
            alike = [number for number, own in enumerate(sizes) if own == size]
            low = int(self.share * size + 1e-9)
            more = round((self.share * size - low) * len(alike))
            for place, number in zip(torch.randperm(len(alike), generator=source).tolist(), alike, strict=True):
                counts[number] = low + (place < more)
        return counts


def categories(block: Block) -> list[list[set[str]]]:
    """Return the units of a block: attention's matrices, the MLP's, and the norms; a bias goes with its matrix."""
    groups: list[list[set[str]]] = [[], [], []]
    for module, role in block.linears.items():
        names = {name for name in block.parameters if name.rpartition(".")[0] == module}
        groups[0 if role in ATTENTION else 1].append(names)
    norms = sorted({name.rpartition(".")[0] for name in block.norms})
    known = set(block.norms).union(*groups[0], *groups[1])
    groups[1] += [{name} for name in block.parameters if name not in known]  # stacks of experts and their router
    groups[2] = [{name for name in block.norms if name.rpartition(".")[0] == module} for module in norms]
    return groups
