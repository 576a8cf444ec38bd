"""RouterLens: the experts that serve a skill, seen through a router that was tuned for it.

Balancing hides which expert is good at what; so first, on a copy, only the routers train on the data. The tuned copy then reads records and in
each block the m experts that get most tokens are taken. They train in the *original* base, with its original routers.
Knows: that order, and the causal check: how much the tuned copy loses without these experts, and without as many others at random.
Does not know: how a copy is trained (``factors/trial.py``), how routing is counted and experts are switched off (``factors/routing.py``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from selectune.errors import UserError
from selectune.parameters.factors.gradients import first
from selectune.parameters.factors.routing import Chosen, mixtures, router_of, routing, selection_of, without_experts
from selectune.parameters.factors.trial import Trial, loss_on, trial
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection


class RouterLens(ParameterMethod):
    """The experts that tuned routers use most."""

    name: ClassVar[str] = "router_lens"
    family: ClassVar[str] = "experts"
    paper: ClassVar[str] = (
        "Understanding and Leveraging the Expert Specialization of Context Faithfulness in Mixture-of-Experts LLMs, arXiv 2508.19594"
    )
    summary: ClassVar[str] = (
        "Of a mixture, the m experts of each block that get most tokens once only the routers were tuned on the data."
    )
    departs: ClassVar[str] = (
        "The routers train as they are, in fp32, for a fixed number of steps; the released code trains rank-8 adapters on them on a 4-bit base "
        "for three epochs and keeps the best on held-out data. Experts are counted on 64 records instead of up to 2,000."
    )

    experts: Annotated[int, Field(gt=0)] | None = None
    """Experts of each block that train (m); left out: as many as are active for a token."""
    steps: Annotated[int, Field(gt=0)] = 50
    """Of tuning the routers."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Of tuning the routers."""
    examples: Annotated[int, Field(gt=0)] = 64
    """Training records to count on, the first by hash of their content."""
    responses: bool = False
    """Count response tokens only; prompts are usually longer, and decide otherwise."""

    def select(self, context: Context) -> Selection:
        base = context.base
        blocks = mixtures(base.anatomy)
        if self.experts is not None and self.experts > min(block.experts for block in blocks):
            raise UserError(f"{self.experts} experts are asked for and a block has {min(b.experts for b in blocks)}",
                            field="parameters.experts")  # fmt: skip
        return selection_of(base.model, base.anatomy, self.skilled(context, self.tuned(context)))

    def tuned(self, context: Context) -> Trial:
        """Return a copy of the base whose routers were tuned on the training records."""
        model = context.base.model
        routers = [f"{router_of(model, block)}.weight" for block in mixtures(context.base.anatomy)]
        return trial(context, Selection.of(model, routers), steps=self.steps, learning_rate=self.learning_rate)

    def skilled(self, context: Context, tuned: Trial) -> dict[int, list[int]]:
        """Return each block's experts that get most tokens in the tuned copy (ties by number)."""
        records = first(context.train, self.examples)
        context.examples_scored = len(records)
        _, counts = routing(context, records, tuned.model, self.responses)
        found = {}
        for block in mixtures(context.base.anatomy):
            active = tuned.model.get_submodule(router_of(tuned.model, block)).top_k
            order = counts[block.index].argsort(descending=True, stable=True)
            found[block.index] = sorted(order[: self.experts or active].tolist())
        return found


def causal_check(context: Context, model: object, chosen: Chosen) -> dict[str, float]:
    """Return a model's loss on the held-out records (nats per response token): as it is, without the chosen experts, without others.

    The ``others`` are as many, at random by the context's generator, from those not chosen as far as they go. The chosen experts serve the
    skill where ``without`` is far above ``others``.
    """
    records, anatomy = context.dev or context.train, context.base.anatomy
    others = {}
    for block in mixtures(anatomy):
        rest = [expert for expert in range(block.experts) if expert not in chosen.get(block.index, ())]
        order = torch.randperm(len(rest), generator=context.generator).tolist()
        others[block.index] = [rest[place] for place in order[: len(chosen.get(block.index, ()))]]
    losses = {"plain": loss_on(context, records, model)}
    for name, experts in (("without", chosen), ("others", others)):
        with without_experts(model, anatomy, experts):
            losses[name] = loss_on(context, records, model)
    return losses
