"""TR-PTS, its parameter half: of every output neuron as many inputs as its block is important.

A block's share of the best entries anywhere, by Fisher information, tells how many inputs each of its neurons trains; the block with the
smallest share trains the fewest. The token half merges tokens of an encoder and has no place in a causal model.

Knows: quotas of blocks. Does not know: how the entries of a row are found (``per_neuron.py``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.parameters.factors.allocation import best
from selectune.parameters.factors.targets import Target
from selectune.parameters.per_neuron import PerNeuron


class TRPTS(PerNeuron):
    """Of every output neuron the inputs with the highest Fisher information, more in blocks that hold more of the best entries."""

    name: ClassVar[str] = "tr_pts"
    paper: ClassVar[str] = "TR-PTS: Task-Relevant Parameter and Token Selection for Efficient Tuning, 2025, arXiv 2507.22872"
    summary: ClassVar[str] = (
        "Of every output neuron the inputs with the highest Fisher information; more of them in important blocks."
    )
    departs: ClassVar[str] = (
        "Tokens are not merged: that breaks causal training. A layer is a whole block. A block without any of the best entries counts "
        "as one with the smallest share that any has. M and the smallest quota are not given in what could be read: 1 % and 1."
    )

    score: str = "fisher"
    """How an entry is scored."""
    k: Annotated[int, Field(gt=0)] = 1
    """Inputs of each neuron in the block with the smallest share."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Of all entries, how many count as the best anywhere."""
    examples: Annotated[int, Field(gt=0)] = 64
    """Training records to score on, the first by hash of their content."""

    def counts(self, eligible: list[Target], scores: dict[str, Tensor]) -> list[int]:
        narrowest = min(target.shape[-1 - target.transposed] for target in eligible)
        if self.k > narrowest:
            raise UserError(f"{self.k} inputs of each neuron are asked for and some have {narrowest}", field="parameters.k",
                            expected=f"at most {narrowest}")  # fmt: skip
        sizes = torch.tensor([target.count for target in eligible])
        top = best(torch.cat([scores[target.name].view(-1) for target in eligible]), max(1, round(self.share * int(sizes.sum()))))
        owner = torch.bucketize(top.cpu(), sizes.cumsum(0), right=True)
        blocks = torch.tensor([target.block for target in eligible])
        found = torch.bincount(blocks[owner], minlength=int(blocks.max()) + 1)[blocks]
        least = int(found[found > 0].min())
        widths = [target.shape[-1 - target.transposed] for target in eligible]
        return [min(round(self.k * max(int(own), least) / least), width) for own, width in zip(found, widths, strict=True)]
