"""General records are mixed in, so that the model keeps hearing what it knew.

Knows: how many, and which. Does not know: where general records come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field

from selectune.data.prepare import read_pool
from selectune.errors import UserError
from selectune.training.policies.policy import Policy

if TYPE_CHECKING:
    from selectune.data import Record
    from selectune.parameters import Context


class Replay(Policy):
    """Adds a share of general records to each epoch."""

    name: ClassVar[str] = "replay"
    paper: ClassVar[str] = (
        "Replay to Remember: Continual Layer-Specific Fine-tuning for German Speech Recognition, ICANN 2023, arXiv 2307.07280"
    )
    summary: ClassVar[str] = "A share of general records is mixed into each epoch."
    departs: ClassVar[str] = (
        "Built-in general conversations, unless others are named (of which those that overlap with what the run is measured by are left out, where "
        "`data.contamination` is remove); the same ones in every epoch, each once."
    )
    acts: ClassVar[bool] = False

    share: Annotated[float, Field(ge=0)] = 0.1
    """General records for each training record; rounded to a whole number of them."""

    source: str | list[str] | None = None
    """Files, folders or hub ids of general records; left out: the built-in conversations (a few dozen)."""

    def records(self, context: Context, clean: Callable[[list[Record]], list[Record]]) -> list[Record]:
        known = context.general if self.source is None else clean(read_pool(self.source, {}, "policy.source"))
        wanted = round(self.share * len(context.train))
        if wanted > len(known):
            raise UserError(f"{wanted} general records are asked for and there are {len(known)}", field="policy.share",
                            expected=f"at most {len(known) / len(context.train):.3g}")  # fmt: skip
        order = torch.randperm(len(known), generator=context.generator).tolist()
        return [known[place] for place in order[:wanted]]
