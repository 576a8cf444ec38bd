"""Half fine-tuning: in each round a random half of the base's matrices trains, and the other half keeps what it knows.

Knows: how a half is drawn (within attention, MLP and norms of every block; over the whole model; whole blocks), round after round.
Does not know: that the same draw can be undone after training (``merging/half_reset.py``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from selectune.adapters.attached import BESIDE
from selectune.parameters.factors.targets import ATTENTION, MLP
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Anatomy

Level = Literal["category", "layer", "model"]
CATEGORIES = ("attention", "mlp", "norm", "other")


@dataclass(frozen=True)
class Unit:
    """What is drawn as one: a matrix with its bias, a norm, a stack of experts."""

    category: str
    names: tuple[str, ...]
    entries: int


def units_of(anatomy: Anatomy) -> list[list[Unit]]:
    """Return the units of each block, in the order of the model; what lies beside a layer belongs to it."""
    found = []
    for block in anatomy.blocks:
        adapted = {name.partition(".base_layer.")[0] for name in block.parameters if ".base_layer." in name}
        groups: dict[str, list[str]] = {}
        for name in block.parameters:
            groups.setdefault(name if name in block.expert_parameters else _layer(name, adapted), []).append(name)
        units = []
        for key, names in groups.items():
            role = block.linears.get(key) or block.linears.get(f"{key}.base_layer", "")
            if names[0] in block.norms:
                category = "norm"
            elif names[0] in block.expert_parameters or role in MLP:
                category = "mlp"
            else:
                category = "attention" if role in ATTENTION else "other"
            units.append(Unit(category, tuple(names), sum(anatomy.sizes[name] for name in names)))
        found.append(units)
    return found


def _layer(name: str, adapted: Collection[str]) -> str:
    """Return the layer that a parameter belongs to or lies beside."""
    around = next((layer for layer in adapted if name.startswith(f"{layer}.")), None)
    return around or name.rpartition(".")[0].removesuffix(f".{BESIDE}")


def draw(
    anatomy: Anatomy, generator: torch.Generator, *, level: Level = "category", ratio: float = 0.5, balanced: bool = False
) -> list[str]:
    """Draw a share of the parameters inside the blocks at random and return their names, in the order of the model.

    Args:
        level: ``category``: of the n attention matrices, MLP matrices and norms of every block ``ratio * n`` each; where that is no whole
            number, one more in a random part of the blocks. ``layer``: whole blocks. ``model``: of all matrices and norms together.
        balanced: within a category, only draws whose number of entries comes closest to the ratio.
    """
    blocks = units_of(anatomy)
    if level == "layer":
        chosen = set(_some(len(blocks), round(ratio * len(blocks)), generator))
        return [name for index, units in enumerate(blocks) for unit in units if index in chosen for name in unit.names]
    if level == "model":
        everything = [unit for units in blocks for unit in units]
        return [name for i in _some(len(everything), round(ratio * len(everything)), generator) for name in everything[i].names]
    names: set[str] = set()
    for category in CATEGORIES:
        members = [[unit for unit in units if unit.category == category] for units in blocks]
        rest = [ratio * len(units) - math.floor(ratio * len(units)) for units in members]
        with_one_more = set(_some(len(blocks), round(sum(rest)), generator, [i for i, part in enumerate(rest) if part > 0]))
        for index, units in enumerate(members):
            count = math.floor(ratio * len(units)) + (index in with_one_more)
            kept = _balanced(units, count, ratio, generator) if balanced else _some(len(units), count, generator)
            names |= {name for place in kept for name in units[place].names}
    return [name for block in anatomy.blocks for name in block.parameters if name in names]


def _some(total: int, count: int, generator: torch.Generator, places: Sequence[int] | None = None) -> list[int]:
    """So many of some places (``0 .. total``), at random, sorted."""
    open_ = list(range(total)) if places is None else list(places)
    order = torch.randperm(len(open_), generator=generator).tolist()
    return sorted(open_[place] for place in order[:count])


def _balanced(units: Sequence[Unit], count: int, ratio: float, generator: torch.Generator) -> tuple[int, ...]:
    """One of the sets of so many units whose entries come closest to the ratio, at random among equals."""
    wanted = ratio * sum(unit.entries for unit in units)
    sets = list(combinations(range(len(units)), count))
    misses = [abs(sum(units[place].entries for place in places) - wanted) for places in sets]
    closest = [places for places, miss in zip(sets, misses, strict=True) if miss == min(misses)]
    return closest[int(torch.randint(len(closest), (1,), generator=generator))]


class Half(ParameterMethod):
    """A random half of the matrices of every block."""

    name: ClassVar[str] = "half"
    family: ClassVar[str] = "modules"
    paper: ClassVar[str] = "HFT: Half Fine-Tuning for Large Language Models, ACL 2025, arXiv 2404.18466"
    summary: ClassVar[str] = (
        "A random half of each block's attention matrices, MLP matrices and norms; another half in each round (HFT)."
    )
    departs: ClassVar[str] = (
        "Biases belong to their matrix, and norms outside the blocks always train; the paper's models have no biases. Ratios other than one "
        "half, routers and stacks of experts are not in the paper: a share that is no whole number is evened out over the blocks."
    )

    level: Literal["category", "layer", "model"] = "category"
    """Where halves are drawn: among like matrices of a block, among blocks, or among all matrices and norms."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the matrices, by number; 1 with ``train_embeddings`` is full fine-tuning."""
    balanced: bool = False
    """Draw only sets whose entries come closest to the ratio; key and value are smaller than query and output where heads share them."""
    round: Annotated[int, Field(ge=0)] = 0
    """Which round of several (a training run each); each has a draw of its own, all from the run's seed."""
    train_embeddings: bool = True
    """Embeddings and head train, as in the paper; where the two are tied they are a way to forget."""

    def select(self, context: Context) -> Selection:
        model, anatomy = context.base.model, context.base.anatomy
        names: list[str] = []
        for _ in range(self.round + 1):
            names = draw(anatomy, context.generator, level=self.level, ratio=self.ratio, balanced=self.balanced)
        inside = sum(anatomy.sizes[name] for block in anatomy.blocks for name in block.parameters)
        share = sum(anatomy.sizes[name] for name in names) / inside
        context.notes.append(f"{share:.1%} of the weights inside the blocks train.")
        blocks = {name for block in anatomy.blocks for name in block.parameters}
        outside = [name for name in anatomy.sizes if name not in blocks]
        if not self.train_embeddings:
            outside = list(anatomy.norms)
        return Selection.of(model, [*names, *outside])
