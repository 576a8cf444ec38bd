"""MindSkip: a router in each of some blocks decides, for a whole sequence, whether its attention is worth computing.

The decision is taken once, on the prompt, and holds for all that is generated after it. Nothing but the routers trains; a cost of every kept
attention, beside the loss, makes them skip.
Knows: the router, its hard decision with the gradient of the soft one, the cost, and how a decision is kept. Does not know: which
blocks were chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from selectune.adapters.attached import AttachedForm, Attachment, Settings, touched
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base


class MindSkip(AttachedForm):
    """Routers that skip attention."""

    name: ClassVar[str] = "mindskip"
    paper: ClassVar[str] = (
        "Router-Tuning: A Simple and Effective Approach for Enabling Dynamic Depth in Transformers, EMNLP 2025, arXiv 2410.13184"
    )
    summary: ClassVar[str] = "Routers that decide for each sequence whether attention is computed in the blocks before the last."
    departs: ClassVar[str] = (
        "A skipped attention is computed and multiplied by zero: what can be skipped without loss is found and measured here, the time is "
        "saved by whoever serves the model. The mean over a sequence keeps packed records apart. The cost is added in each forward pass. "
        "The paper's learning rate of 1e-5 is for 8B models."
    )
    learning_rate_default: ClassVar[float] = 1e-3

    blocks: Annotated[int, Field(gt=0)] = 12
    """Blocks with a router: so many of the chosen ones, the base's last never among them."""
    cost: Annotated[float, Field(ge=0)] = 0.01
    """Of keeping all attention, in nats; 0: no router learns to skip unless that helps."""

    def places(self, base: Base, selection: Selection) -> dict[str, Settings]:
        last = base.anatomy.blocks[-1].index
        inside = [block for block in touched(base, selection) if block.index != last]
        return {_attention(base.model, block.prefix): {} for block in inside[-self.blocks :]}

    def build(self, layer: Any, settings: Settings, seed: int) -> Attachment:
        first = next(
            one for _, one in layer.named_modules() if getattr(one, "weight", None) is not None and one.weight.dim() == 2
        )
        width = first.weight.shape[0] if type(first).__name__.endswith("Conv1D") else first.weight.shape[1]
        return Router(width, self.cost / self.blocks)


def _attention(model: nn.Module, prefix: str) -> str:
    """Return the name of a block's attention."""
    return next(
        f"{prefix}.{name}" for name, _ in model.get_submodule(prefix).named_children() if "att" in name and "norm" not in name
    )


class Router(Attachment):
    """Multiplies what attention gives by 1 or 0, for a whole record."""

    def __init__(self, width: int, cost: float) -> None:
        super().__init__()
        self.cost = cost
        self.weight = nn.Parameter(torch.zeros(width))
        self.decision: Tensor | None = None
        """Of the last prompts, ``(sequences,)``: 1 keeps attention."""

    def decide(self, states: Tensor, positions: Tensor | None) -> Tensor:
        """Return 1 (keep) or 0 for each token of ``states``, ``(sequences, length, hidden)``; all tokens of a record alike.

        Args:
            positions: ``(sequences, length)``, 0 where a record begins; None: each sequence is one record.
        """
        logits = states.float() @ self.weight
        records = torch.zeros_like(logits, dtype=torch.int64)
        if positions is not None:
            records = (positions.expand(logits.shape) == 0).long().cumsum(1)
        sums = logits.new_zeros(len(logits), int(records.max()) + 1)
        means = sums.scatter_add(1, records, logits) / sums.scatter_add(1, records, torch.ones_like(logits)).clamp(min=1)
        soft = torch.sigmoid(means.gather(1, records))
        return (soft >= 0.5).float() + (soft - soft.detach())

    def after_call(self, layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        states = inputs[0] if inputs else keywords["hidden_states"]
        continued = keywords.get("past_key_values") is not None and states.shape[1] == 1 and self.decision is not None
        if continued and len(self.decision) == len(states):  # type: ignore[arg-type]
            gate = self.decision[:, None]  # type: ignore[index]
        else:
            gate = self.decide(states, keywords.get("position_ids"))
            self.decision = gate[:, -1].detach()
            if self.training and gate.requires_grad:
                gate = _Charged.apply(gate, self.cost)  # type: ignore[no-untyped-call]
        attention, *rest = output if isinstance(output, tuple) else (output,)
        gated = self.gated(states, attention, gate[..., None].to(attention.dtype))
        return (gated, *rest) if isinstance(output, tuple) else gated

    def gated(self, states: Tensor, output: Tensor, gate: Tensor) -> Tensor:
        """Return what goes on, given what came in, what came out, and the gate of each token."""
        return output * gate


class _Charged(torch.autograd.Function):
    """Adds the gradient of a cost of the mean gate."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, cost: float) -> Tensor:
        ctx.charge = cost / gate.numel()
        return gate.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] + ctx.charge, None
