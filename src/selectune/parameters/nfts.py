"""Evolution over what trains where: each group of blocks frozen, by its attention, by its MLP, or by both.

Knows: the code of a choice, and how the last few choices are compared. Does not know: how evolution works (``factors/search.py``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from selectune.parameters.factors.roles import weights_by_role
from selectune.parameters.factors.search import Code, Trials, distant, evolve
from selectune.parameters.method import Context
from selectune.parameters.searched import Searched
from selectune.parameters.selection import Part, Selection

OPTIONS = ("", "attention", "mlp", "linear")


class NFTS(Searched):
    """The best of a few diverse choices that evolution finds."""

    name: ClassVar[str] = "nfts"
    family: ClassVar[str] = "blocks"
    paper: ClassVar[str] = "Neural Fine-Tuning Search for Few-Shot Learning, ICLR 2024, arXiv 2306.09295"
    summary: ClassVar[str] = "Evolution over frozen, attention, MLP or both for each group of blocks, judged by short trainings."
    departs: ClassVar[str] = (
        "A group is frozen or trains by its attention, its MLP or both; the paper's options are frozen or tuned, with an adapter or without, "
        "and adapters are a form here. Each choice is trained from the base by itself: no supernet shares weights. Finalists are compared by their "
        "held-out loss after a longer training; the paper takes the loss on the few examples trained on, in episodes of image classification. "
        "`trials` does not count the finalists' trainings."
    )

    groups: Annotated[int, Field(gt=0)] = 10
    """Groups of neighbouring blocks that are decided together."""
    population: Annotated[int, Field(gt=1)] = 20
    """Choices alive at a time."""
    generations: Annotated[int, Field(ge=0)] = 8
    """The paper: 15."""
    parents: Annotated[int, Field(gt=0)] = 8
    """The best, which are recombined; as many children join and as many of the worst leave."""
    mutation: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Chance of a digit of a child to change."""
    finalists: Annotated[int, Field(gt=0)] = 3
    """Choices that are compared at the end; 1: the best is taken as it is."""
    distance: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Least cosine distance of two finalists: the share of groups on which they differ."""
    retention: Annotated[float, Field(ge=0)] = 1.0
    """How much a rise of the loss on general conversations counts against the gain."""

    def select(self, context: Context) -> Selection:
        groups = min(self.groups, len(context.base.anatomy.blocks))
        gains = self.gains(context)
        rounds = self.population + self.generations * min(self.parents, self.population)
        with self.table(context, lambda code: gains(self.decode(context, code)), rounds) as worth:
            evolve(groups, len(OPTIONS), worth, context.generator, population=self.population, generations=self.generations,
                   parents=self.parents, mutation=self.mutation)  # fmt: skip
        history = {code: value for code, value in worth.values.items() if any(code)}
        if not history:
            history = {(len(OPTIONS) - 1,) * groups: 0.0}
        finalists = distant(history, len(OPTIONS), self.finalists, self.distance)
        if len(finalists) > 1:
            longer = Trials(context, 2 * self.steps, self.learning_rate, self.examples, retention=self.retention)
            finalists.sort(key=lambda code: -longer(self.decode(context, code)))
        return self.decode(context, finalists[0])

    def decode(self, context: Context, code: Code) -> Selection:
        """Return the weights that a code stands for: a digit for each group, from the embeddings to the head."""
        count = len(context.base.anatomy.blocks)
        parts: dict[str, Part] = {}
        for group, digit in enumerate(code):
            inside = range(group * count // len(code), (group + 1) * count // len(code))
            if digit:
                parts |= weights_by_role(context.base, OPTIONS[digit], blocks=inside).parts
        return Selection(dict(sorted(parts.items())))
