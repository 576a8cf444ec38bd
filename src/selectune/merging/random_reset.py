"""Control: a random share of the weights that training changed returns to the base's values.

Knows: which weights changed, and how some are drawn. Does not know: what they are worth.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field

from selectune.merging.method import Finish

if TYPE_CHECKING:
    from selectune.parameters.method import Context


class RandomReset(Finish):
    """A random share goes back."""

    name: ClassVar[str] = "random_reset"
    summary: ClassVar[str] = "Control: a random share of the weights that changed returns to the base's values."

    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Of the weights that changed, how many return."""

    @torch.no_grad()
    def finish(self, model: Any, context: Context) -> dict[str, Any]:
        originals = dict(context.base.model.named_parameters())
        changed = {name: (value != originals[name]).reshape(-1).nonzero().squeeze(1) for name, value in model.named_parameters()}
        total = sum(len(places) for places in changed.values())
        drawn = torch.zeros(total, dtype=torch.bool)
        drawn[torch.randperm(total, generator=context.generator)[: math.ceil(self.share * total)]] = True
        pieces = drawn.split([len(places) for places in changed.values()])
        for (name, value), piece in zip(model.named_parameters(), pieces, strict=True):
            places = changed[name][piece.to(value.device)]
            value.view(-1)[places] = originals[name].reshape(-1)[places].to(value.device)
        return {"changed weights": total, "weights returned": int(drawn.sum())}
