"""Entries that become the domain's own: those that move most, round by round, while the rest is shared with general conversations.

Knows: the rounds of two clients, the growth of their masks, and averaging. Does not know: how a client trains (``factors/trial.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.parameters.factors.allocation import best
from selectune.parameters.factors.gradients import first
from selectune.parameters.factors.targets import targets
from selectune.parameters.factors.trial import trial
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Part, Selection

if TYPE_CHECKING:
    from selectune.data import Record

Masks = dict[str, Tensor]


def grow(mask: Tensor, change: Tensor, share: float, bound: float) -> Tensor:
    """Return a mask with the most changed of its free entries added: a share of them, none once more than ``bound`` of all are taken."""
    if mask.float().mean() > bound:
        return mask
    free = (~mask).view(-1).nonzero().squeeze(-1)
    grown = mask.clone()
    grown.view(-1)[free[best(change.abs().view(-1)[free], int(share * len(free)))]] = True
    return grown


def averaged(values: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Return each entry's mean over the clients that share it (mask off); one that nobody shares is 0 and goes nowhere."""
    shared = torch.stack([~mask for mask in masks]).to(values[0].dtype)
    return (torch.stack(list(values)) * shared).sum(0) / shared.sum(0).clamp(min=1)


class FedSelect(ParameterMethod):
    """The domain's personal entries."""

    name: ClassVar[str] = "fedselect"
    family: ClassVar[str] = "elements"
    paper: ClassVar[str] = (
        "FedSelect: Customized Selection of Parameters for Fine-Tuning during Personalized Federated Learning, 2023, arXiv 2306.13264; "
        "CVPR 2024, arXiv 2404.02478"
    )
    summary: ClassVar[str] = "Entries that move most while domain and general conversations train in turns and share the rest."
    departs: ClassVar[str] = (
        "Two clients on one machine, the training records and general conversations; what is handed on is the first one's mask, and the "
        "specialist trains from the base with it, alone. A phase is a number of steps instead of an epoch, its learning rate falls to 0, and its "
        "gradient is clipped to a norm of 1."
    )

    targets: str = "linear"
    """Which weights may be chosen from: ``linear``, ``attention``, ``mlp``, or roles joined by ``+``."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Of a matrix's free entries that become personal in a round."""
    bound: Annotated[float, Field(gt=0, le=1)] = 0.3
    """A matrix with more personal entries than this grows no more."""
    rounds: Annotated[int, Field(gt=0)] = 3
    """Of local training and averaging."""
    steps: Annotated[int, Field(gt=0)] = 50
    """Of each of the two phases of a client's round: personal entries, then shared ones."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    """Of plain gradient descent."""
    examples: Annotated[int, Field(gt=0)] = 256
    """Records of each client, the first by hash of their content."""

    def select(self, context: Context) -> Selection:
        names = [target.name for target in targets(context.base, self.targets)]
        records = [first(some, self.examples) for some in (context.train, context.general)]
        masks, _ = self.play(context, names, records)
        parts = {
            name: Part(tuple(mask.shape), "elements", mask.view(-1).nonzero().squeeze(-1)) for name, mask in masks[0].items()
        }
        chosen = {name: part for name, part in parts.items() if part.count()}
        if not chosen:
            raise UserError("no entry became personal", field="parameters.share", expected="a larger share")
        context.examples_scored = len(records[0])
        return Selection(dict(sorted(chosen.items())))

    def play(self, context: Context, names: list[str], records: Sequence[list[Record]]) -> tuple[list[Masks], list[Any]]:
        """Run the rounds and return each client's masks and model, the last right after averaging."""
        models = [copy.deepcopy(context.base.model) for _ in records]
        start = dict(context.base.model.named_parameters())
        masks = [{name: torch.zeros_like(start[name], dtype=torch.bool) for name in names} for _ in records]
        for turn in range(self.rounds):
            before = [{name: _weight(model, name).clone() for name in names} for model in models]
            for client, some in enumerate(records):
                for personal in (True, False):
                    models[client] = self.phase(context, models[client], masks[client], some, personal, 2 * turn + (not personal))
            changes = [{n: _weight(m, n) - old[n] for n in names} for m, old in zip(models, before, strict=True)]
            with torch.no_grad():
                for name in names:
                    mean = averaged([_weight(model, name) for model in models], [mask[name] for mask in masks])
                    for model, mask in zip(models, masks, strict=True):
                        weight = model.get_parameter(name)
                        weight.copy_(torch.where(mask[name], weight, mean))
            masks = [
                {name: grow(mask[name], change[name], self.share, self.bound) for name in names}
                for mask, change in zip(masks, changes, strict=True)
            ]
        return masks, models

    def phase(self, context: Context, model: Any, mask: Masks, records: Sequence[Record], personal: bool, seed: int) -> Any:
        """Train the personal or the shared entries of one client's model and return it."""
        if personal and not any(one.any() for one in mask.values()):
            return model

        def keep(step: int, trained: Mapping[str, Tensor]) -> None:
            for name, value in trained.items():
                if value.grad is not None:
                    value.grad.mul_(mask[name] if personal else ~mask[name])

        theirs = replace(context, base=replace(context.base, model=model))
        selection = Selection.of(model, mask)
        return trial(theirs, selection, records=records, steps=self.steps, learning_rate=self.learning_rate, optimiser="sgd", seed=seed,
                     before_step=keep).model  # fmt: skip


def _weight(model: Any, name: str) -> Tensor:
    return model.get_parameter(name).detach().float()  # type: ignore[no-any-return]
