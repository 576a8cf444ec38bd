"""Which tensors to freeze, learnt: a mask between the base and its tuned copy that serves two losses.

Knows: the mask, its gradient, and how it is learnt. Does not know: how the base is tuned (``factors/trial.py``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from selectune.parameters.factors.gradients import each_gradient, first, rows_of
from selectune.parameters.factors.targets import targets
from selectune.parameters.factors.trial import Trial, trial
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection
from selectune.progress import watched

TEMPERATURE = 0.2


def learn(
    gradient: Callable[[Tensor, int], Tensor],
    sizes: Tensor,
    *,
    steps: int,
    rate: float,
    frozen: float,
    pull: float,
    quiet: bool = True,
) -> Tensor:
    """Return the mask, ``(tensors,)`` fp64 in 0..1, 1 for frozen, that descends a loss and the distance of its mean from ``frozen``.

    The mask is ``sigmoid(x / 0.2)``; all of it starts at ``frozen``, so that what is learnt decides and no draw. A tensor's gradient counts by
    entry, and all are brought to a mean size of 1: neither large tensors nor large losses decide the pace.

    Args:
        gradient: from a mask and the step to the loss's gradient by the mask, ``(tensors,)``. sizes: entries of each tensor, ``(tensors,)``.
    """
    logits = torch.full((len(sizes),), TEMPERATURE * math.log(frozen / (1 - frozen)), dtype=torch.float64)
    for step in watched(range(steps), "learning the mask", quiet):
        mask = (logits / TEMPERATURE).sigmoid()
        slope = gradient(mask, step).double() / sizes
        slope = slope / slope.abs().mean().clamp(min=1e-30) + 2 * pull * (mask.mean() - frozen)
        logits -= rate * slope * mask * (1 - mask) / TEMPERATURE
    return (logits / TEMPERATURE).sigmoid()


class FreezeAsGuard(ParameterMethod):
    """The matrices that the mask leaves free."""

    name: ClassVar[str] = "freeze_as_guard"
    family: ClassVar[str] = "modules"
    paper: ClassVar[str] = (
        "FreezeAsGuard: Mitigating Illegal Adaptation of Diffusion Models via Selective Tensor Freezing, 2024, arXiv 2405.17472"
    )
    summary: ClassVar[str] = (
        "Matrices that may change, by a mask learnt between the base and its tuned copy: gain the domain, keep the rest."
    )
    departs: ClassVar[str] = (
        "Language models; by default the roles are turned, to freeze what costs general ability most and helps the domain least (`resist` is the "
        "paper's aim). The tuned copy is trained once, ahead of the mask, and not in turns with it. Gradients of the mask count by entry and are "
        "brought to one size, as those of large tensors are larger; rates are therefore others than the paper's. The mask starts even, not at "
        "random: the steps here would not forget a draw."
    )

    aim: Literal["protect", "resist"] = "protect"
    """``protect``: a low loss on the domain and on general conversations; ``resist``: a high loss on the domain, a low one on general ones."""
    frozen: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the matrices that the mask is drawn to freeze (the paper: 0.2, the code: 0.8)."""
    pull: Annotated[float, Field(ge=0)] = 5.0
    """How strongly."""
    general_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the loss on general conversations, beside that of the domain."""
    steps: Annotated[int, Field(gt=0)] = 50
    """Of the tuned copy's training, and of the mask's."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Of the tuned copy."""
    mask_rate: Annotated[float, Field(gt=0)] = 0.05
    """Of the mask."""
    examples: Annotated[int, Field(gt=0)] = 64
    """Records of either kind."""

    def select(self, context: Context) -> Selection:
        names = [target.name for target in targets(context.base)]
        tuned = trial(context, Selection.of(context.base.model, names), records=first(context.train, self.examples), steps=self.steps,
                      learning_rate=self.learning_rate)  # fmt: skip
        sizes = torch.tensor([context.base.anatomy.sizes[name] for name in names], dtype=torch.float64)
        mask = learn(
            self.gradient(context, names, tuned),
            sizes,
            steps=self.steps,
            rate=self.mask_rate,
            frozen=self.frozen,
            pull=self.pull,
            quiet=context.quiet,
        )
        free = [name for name, share in zip(names, mask.tolist(), strict=True) if share <= 0.5] or [names[int(mask.argmin())]]
        context.examples_scored = min(self.examples, len(context.train))
        context.notes.append(f"{len(names) - len(free)} of {len(names)} matrices are frozen.")
        return Selection.of(context.base.model, free)

    def gradient(self, context: Context, names: list[str], tuned: Trial) -> Callable[[Tensor, int], Tensor]:
        """Return what gives the two losses' gradient by the mask, one pack of records of either kind a step."""
        model = copy.deepcopy(context.base.model)
        weights = dict(model.named_parameters())
        sides = [rows_of(context, first(some, self.examples), packed=True) for some in (context.train, context.general)]
        signs = (1.0 if self.aim == "protect" else -1.0, self.general_weight)

        def at(mask: Tensor, step: int) -> Tensor:
            interpolate(weights, names, tuned, mask)
            slopes = dict.fromkeys(names, 0.0)
            for rows, sign in zip(sides, signs, strict=True):

                def add(name: str, value: Tensor, tokens: int, sign: float = sign) -> None:
                    slopes[name] -= sign * float((value * tuned.change(name)).sum()) / max(tokens, 1)

                each_gradient(
                    model, [rows[step % len(rows)]], names, add, meter=context.meter, bfloat16=context.bfloat16, quiet=True
                )
            return torch.tensor([slopes[name] for name in names], dtype=torch.float64)

        return at


@torch.no_grad()
def interpolate(weights: dict[str, torch.nn.Parameter], names: list[str], tuned: Trial, mask: Tensor) -> None:
    """Write ``tuned + mask * (base - tuned)`` into weights."""
    for name, share in zip(names, mask.tolist(), strict=True):
        weights[name].copy_(tuned.start[name] if share == 1 else tuned.trained[name] - share * tuned.change(name))
