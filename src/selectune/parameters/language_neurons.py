"""Language-aware neurons (LANDeRMT), for domains: of the neurons of the MLPs, those that are general and those of the data's own groups.

In the blocks that change most of what passes through them, each neuron's awareness of each group of records is measured. The most aware on
average are general; of the others each is specific to the groups of which it is (nearly) most aware. General neurons train, and those
specific to a group of the training data; those specific to general conversations stay.
Knows: groups, and which neuron is general or specific. Does not know: how awareness is measured (``factors/neurons.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.parameters.factors.allocation import best
from selectune.parameters.factors.gradients import first
from selectune.parameters.factors.neurons import awareness, neurons
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.data import Record

GENERAL = "general conversations"


class LanguageNeurons(ParameterMethod):
    """General neurons and those of the data's own groups."""

    name: ClassVar[str] = "language_neurons"
    family: ClassVar[str] = "heads-neurons-channels"
    paper: ClassVar[str] = (
        "LANDeRMT: Detecting and Routing Language-Aware Neurons for Selectively Finetuning LLMs to Machine Translation, ACL 2024, arXiv 2409.19523"
    )
    summary: ClassVar[str] = (
        "In the k blocks that change most: neurons that every group of records needs, and those that the training data needs."
    )
    departs: ClassVar[str] = (
        "Groups are the files of the training data and general conversations instead of language pairs. There is no gate between general and "
        "specific neurons (in the paper it multiplies the input of the general ones; what the specific ones get could not be checked), so "
        "nothing is added to the model; every record trains all chosen neurons, unless the policy `routed` keeps specific ones to their "
        "groups. A block's change is the mean size of the difference of its output "
        "and its input; blocks are chosen once, by the mean over groups. No code was found; the shares of 50 % and 0.7 are ours."
    )

    k: Annotated[int, Field(gt=0)] = 8
    """Blocks whose neurons are looked at: those that change most of what passes through them."""
    general: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of a block's neurons that count as general: those most aware on average."""
    kappa: Annotated[float, Field(gt=0, le=1)] = 0.7
    """A neuron is specific to each group of which it is at least so aware, relative to the group of which it is most aware."""
    examples: Annotated[int, Field(gt=0)] = 32
    """Records of each group, the first by hash of their content."""

    def select(self, context: Context) -> Selection:
        there = len(context.base.anatomy.blocks)
        if self.k > there:
            raise UserError(
                f"{self.k} blocks are asked for and the base has {there}", field="parameters.k", expected=f"at most {there}"
            )
        blocks, masks = self.roles(context)
        chosen = masks[""].clone()
        for name, mask in masks.items():
            if name not in ("", GENERAL):
                chosen |= mask
        return neurons(context.base, {block: chosen[block].nonzero().squeeze(-1) for block in blocks})

    def groups(self, context: Context) -> dict[str, list[Record]]:
        """Return the groups of records: those of each file, and general conversations."""
        sources = sorted({record.source for record in context.train})
        found = {source or "training data": [r for r in context.train if r.source == source] for source in sources}
        return found | {GENERAL: context.general}

    def roles(self, context: Context) -> tuple[list[int], dict[str, Tensor]]:
        """Return the blocks that are looked at, and who needs which neuron.

        Returns:
            Numbers of blocks; and group -> ``(blocks, neurons)`` bool, ``""`` for the general ones.
        """
        aware, changes = {}, []
        for name, records in self.groups(context).items():
            chosen = first(records, self.examples)
            context.examples_scored += len(chosen)
            aware[name], change = awareness(context, chosen)
            if name != GENERAL:
                changes.append(change)
        blocks = best(torch.stack(changes).mean(0), self.k).tolist()
        return blocks, labelled(aware, self.general, self.kappa)


def labelled(aware: dict[str, Tensor], general: float, kappa: float) -> dict[str, Tensor]:
    """Tell general neurons from specific ones, in each block apart.

    Args:
        aware: group -> ``(blocks, neurons)``. general, kappa: as in :class:`LanguageNeurons`.

    Returns:
        group -> bool of that shape, ``""`` for the general ones; a specific neuron is of one group at least, a general one of none.
    """
    normed = {name: value / value.amax(1, keepdim=True).clamp(min=1e-30) for name, value in aware.items()}
    together = torch.stack(list(normed.values()))
    mean, most = together.mean(0), together.amax(0)
    everyone = torch.zeros_like(mean, dtype=torch.bool)
    for block, scores in enumerate(mean):
        everyone[block, best(scores, round(general * len(scores)))] = True
    return {"": everyone} | {name: (value >= kappa * most) & (most > 0) & ~everyone for name, value in normed.items()}
