"""FiRST: a router in each block decides, for a whole sequence, whether the block is worth computing; low-rank adapters mend what is lost.

Knows: routers of whole blocks and the adapters beside their layers. Does not know: that routers train first and adapters afterwards (the policy
``first``), or how a decision is made and kept (``mindskip.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from selectune.adapters.attached import AttachedForm, Attachment, Settings, is_transposed, touched
from selectune.adapters.mindskip import Router
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base


START = 2.0
"""Of the routers' bias: what goes into a block is not normalised, and from 0 the first step could skip most blocks at once."""


class FiRST(AttachedForm):
    """Routers that skip blocks, and low-rank adapters."""

    name: ClassVar[str] = "first"
    paper: ClassVar[str] = (
        "FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction, EMNLP Findings 2025, arXiv 2410.12513"
    )
    summary: ClassVar[str] = (
        "Routers that decide for each sequence whether a block is computed, and low-rank adapters (with the policy `first`)."
    )
    departs: ClassVar[str] = (
        "Decisions are hard in training too, with the gradient of the soft ones, and hold for a whole record. In training, in the development "
        "loss and when given answers are scored they are taken on prompt and answer, only where text is generated on the prompt alone. Of a batch "
        "in which some records skip a block, all attend, and those that keep it go through the MLP. No code was found; the form of the cost "
        "is ours, and that routers start at a bias of 2, which keeps every block."
    )
    learning_rate_default: ClassVar[float] = 1e-3
    keeps_last: ClassVar[bool] = True

    first_blocks: Annotated[int, Field(ge=0)] = 2
    """Blocks at the beginning that are always computed."""
    cost: Annotated[float, Field(ge=0)] = 0.05
    """Of keeping all blocks, in nats."""
    rank: Annotated[int, Field(gt=0)] = 8
    """Of the adapters."""

    def places(self, base: Base, selection: Selection) -> dict[str, Settings]:
        blocks = touched(base, selection)
        routed = [block for block in blocks if block.index >= self.first_blocks]
        adapted = {name: {"rank": self.rank} for block in blocks for name, role in block.linears.items() if role != "router"}
        return {block.prefix: {"cost": self.cost / len(routed), "width": base.anatomy.hidden_size} for block in routed} | adapted

    def build(self, layer: Any, settings: Settings, seed: int) -> Attachment:
        if "width" in settings:
            return BlockRouter(settings["width"], settings["cost"])
        outputs, inputs = layer.weight.shape[::-1] if is_transposed(layer) else layer.weight.shape
        return LowRank(outputs, inputs, settings["rank"], torch.Generator().manual_seed(seed))


class BlockRouter(Router):
    """Passes on what came out of a block, or what went in; in doubt, what came out."""

    def __init__(self, width: int, cost: float) -> None:
        super().__init__(width, cost)
        self.bias = nn.Parameter(torch.full((1,), START))

    def logits(self, states: Tensor) -> Tensor:
        return super().logits(states) + self.bias

    def narrowed(self, layer: nn.Module, gate: Tensor) -> AbstractContextManager[None]:
        unit = getattr(layer, "mlp", None)
        if gate.requires_grad or unit is None or bool(gate.all()):
            return nullcontext()
        return some_tokens(unit, gate.reshape(-1).nonzero().squeeze(-1))

    def left_out(self, states: Tensor) -> Tensor:
        return states

    def gated(self, states: Tensor, output: Tensor, gate: Tensor) -> Tensor:
        return output * gate + states * (1 - gate)


@contextmanager
def some_tokens(unit: Any, kept: Tensor) -> Iterator[None]:
    """Within, a module that treats each token by itself computes only some of them, and gives zero for the others.

    Args:
        kept: ``(n,)`` int64, places in the sequences laid end to end.
    """
    before = unit.__dict__.get("forward")
    whole = unit.forward

    def forward(states: Tensor, *inputs: Any, **keywords: Any) -> Any:
        found = whole(states.flatten(0, -2)[kept][None], *inputs, **keywords)
        if not isinstance(found, Tensor):  # the loads of experts, too, which are those of all tokens
            return whole(states, *inputs, **keywords)
        return (
            states.new_zeros(states.shape, dtype=found.dtype)
            .view(-1, states.shape[-1])
            .index_copy_(0, kept, found[0])
            .view(states.shape)
        )

    unit.forward = forward
    try:
        yield
    finally:
        if before is None:
            del unit.forward
        else:
            unit.forward = before


class LowRank(Attachment):
    """Adds ``2 up @ down @ x``."""

    def __init__(self, outputs: int, inputs: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter((torch.rand(rank, inputs, generator=generator) * 2 - 1) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def after(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        states = inputs[0].to(self.down.dtype)
        return output + (2 * nn.functional.linear(nn.functional.linear(states, self.down), self.up)).to(output.dtype)
