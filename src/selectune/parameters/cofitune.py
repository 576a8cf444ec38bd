"""A band of blocks and the modules in it, found coarse to fine: half of the depth, a quarter, then modules.

Knows: the tree of bands and modules. Does not know: the fine part of the method, the soft mask on gradients, which acts while training.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field

from selectune.errors import UserError
from selectune.parameters.factors.roles import weights_by_role
from selectune.parameters.factors.search import descend
from selectune.parameters.factors.trial import Diverged
from selectune.parameters.method import Context
from selectune.parameters.searched import Searched
from selectune.parameters.selection import Selection

Node = tuple[float, float, str]
"""From and to, as shares of the depth, and roles."""
MODULES = ("query+key+value", "up+down")
BOTH = "+".join(MODULES)


def children(node: Node | None) -> list[Node]:
    """Return what is tried next: halves of the depth (the middle one too), the quarters of a half, the modules of a band."""
    if node is None:
        return [(start, start + 0.5, BOTH) for start in (0.0, 0.25, 0.5)]
    start, end, roles = node
    if end - start > 0.25:
        return [(start, start + 0.25, BOTH), (start + 0.25, end, BOTH)]
    return [(start, end, module) for module in MODULES] if roles == BOTH else []


class CoFiTune(Searched):
    """The best of the bands and modules on the way down the tree."""

    name: ClassVar[str] = "cofitune"
    family: ClassVar[str] = "blocks"
    paper: ClassVar[str] = (
        "Balancing Speciality and Versatility: a Coarse to Fine Framework for Supervised Fine-tuning Large Language Model, ACL Findings 2024, "
        "arXiv 2404.10306"
    )
    summary: ClassVar[str] = (
        "A band of blocks and its attention or MLP, by a search down a tree that weighs speciality and versatility."
    )
    departs: ClassVar[str] = (
        "A node is worth its gain on held-out records, less the rise of the loss on general conversations, in place of the paper's two scores. The "
        "best of all nodes that were tried is taken, wherever the way down ends. The soft mask on gradients is a policy. `up+down` has no `gate`, as "
        "in the released code."
    )

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Of a trial, falling to zero."""
    retention: Annotated[float, Field(ge=0)] = 1.0
    """How much a rise of the loss on general conversations counts against the gain."""
    band: str = ""
    """A band that is known to be good, such as ``0.25-0.5``, instead of a search: its MLPs' up and down train (the paper's usual winner)."""

    def select(self, context: Context) -> Selection:
        if self.band:
            return self.weights(context, (*self._given(), "up+down"))
        gains = self.gains(context)
        with self.table(context, lambda node: gains(self.weights(context, node)), 7) as worth:
            list(descend(None, lambda node: self._there(context, node), lambda node: worth(node)))
        for (start, end, roles), value in worth.values.items():
            if roles == BOTH:
                for block in self._blocks(context, start, end):
                    context.block_scores[block] = max(value, context.block_scores.get(block, value))
        best = worth.best()
        if worth.values[best] == -math.inf:
            raise Diverged("every short training of the search diverged", field="parameters.learning_rate",
                           expected=f"less than {self.learning_rate:g}")  # fmt: skip
        context.notes.append(
            f"Blocks {best[0]:.0%} to {best[1]:.0%} of the depth, {best[2].replace('+', ', ')}, of {len(worth.values)} choices tried."
        )
        return self.weights(context, best)

    def weights(self, context: Context, node: Node) -> Selection:
        """Return the weights of a node."""
        start, end, roles = node
        return weights_by_role(context.base, roles, blocks=self._blocks(context, start, end))

    def _there(self, context: Context, node: Node | None) -> list[Node]:
        """Children that hold at least one block."""
        return [child for child in children(node) if self._blocks(context, child[0], child[1])]

    @staticmethod
    def _blocks(context: Context, start: float, end: float) -> list[int]:
        count = len(context.base.anatomy.blocks)
        return list(range(round(start * count), round(end * count)))

    def _given(self) -> tuple[float, float]:
        try:
            start, end = (float(part) for part in self.band.split("-"))
        except ValueError:
            start, end = 1.0, 0.0
        if not 0 <= start < end <= 1:
            raise UserError(
                f"'{self.band}' is no band", field="parameters.band", expected="two shares of the depth, such as 0.25-0.5"
            )
        return start, end
