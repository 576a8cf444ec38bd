"""MindSkip: a router in each of some blocks decides, for a whole sequence, whether its attention is worth computing.

Where text is generated the decision is taken once, on the prompt, and holds for all that comes after it. Where a whole record goes through
the model at once, in training and when answers are scored, it is taken on the whole record, the answer included. Nothing but the routers
trains; a cost of every kept attention, beside the loss, makes them skip. Where no gradient is asked for, what nobody keeps is not computed.
Knows: the router, its hard decision with the gradient of the soft one, the cost, how a decision is kept, and what must be computed all the
same. Does not know: which blocks were chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from selectune.adapters.attached import AttachedForm, Attachment, Settings, touched
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base


DECISIONS = "selectune_decisions"
"""In a cache: place of a layer -> the prompts' decisions, ``(sequences,)``."""


class MindSkip(AttachedForm):
    """Routers that skip attention."""

    name: ClassVar[str] = "mindskip"
    paper: ClassVar[str] = (
        "Router-Tuning: A Simple and Effective Approach for Enabling Dynamic Depth in Transformers, EMNLP 2025, arXiv 2410.13184"
    )
    summary: ClassVar[str] = "Routers that decide for each sequence whether attention is computed in the blocks before the last."
    departs: ClassVar[str] = (
        "Of a batch in which some sequences skip an attention and some do not, all are computed. The mean over a sequence keeps packed records "
        "apart. In training, in the development loss and when given answers are scored, the mean is over prompt and answer; only where text is "
        "generated is it over the prompt alone. The cost is a mean over tokens, so that longer records (and padding) count for "
        "more, and is added in each forward pass. The paper's learning rate of 1e-5 is for 8B models."
    )
    learning_rate_default: ClassVar[float] = 1e-3
    keeps_last: ClassVar[bool] = True

    blocks: Annotated[int, Field(gt=0)] = 12
    """Blocks with a router: so many of the chosen ones, the base's last never among them."""
    cost: Annotated[float, Field(ge=0)] = 0.01
    """Of keeping the attention of one block, in nats (the paper: 0.01 to 1); 0: no router learns to skip unless that helps."""

    def places(self, base: Base, selection: Selection) -> dict[str, Settings]:
        last = base.anatomy.blocks[-1].index
        inside = [block for block in touched(base, selection) if block.index != last]
        return {_attention(base.model, block.prefix): {} for block in inside[-self.blocks :]}

    def build(self, layer: Any, settings: Settings, seed: int) -> Attachment:
        first = next(
            one for _, one in layer.named_modules() if getattr(one, "weight", None) is not None and one.weight.dim() == 2
        )
        width = first.weight.shape[0] if type(first).__name__.endswith("Conv1D") else first.weight.shape[1]
        return Router(width, self.cost)


def _place(layer: nn.Module) -> int:
    """Return the number of the attention that a layer is or holds; 0 where it has none."""
    return next((int(one.layer_idx) for one in layer.modules() if getattr(one, "layer_idx", None) is not None), 0)  # type: ignore[arg-type]


def _attention(model: nn.Module, prefix: str) -> str:
    """Return the name of a block's attention."""
    return next(
        f"{prefix}.{name}" for name, _ in model.get_submodule(prefix).named_children() if "att" in name and "norm" not in name
    )


class Router(Attachment):
    """Multiplies what attention gives by 1 or 0, for a whole record; computes it where it is kept."""

    whole_rows = True
    """What is computed for a token depends on its whole record: rows must be what they are when the model is used."""

    def __init__(self, width: int, cost: float) -> None:
        super().__init__()
        self.cost = cost
        self.weight = nn.Parameter(torch.zeros(width))
        self.decision: Tensor | None = None
        """Of the last prompts, ``(sequences,)``: 1 keeps attention."""
        self.returns: int | None = None
        """Values that the layer returns in a tuple, None but for the first; 0: a tensor. None: not known before one call, or otherwise."""

    def logits(self, states: Tensor) -> Tensor:
        """Return how much speaks for keeping, at each token, ``(sequences, length)``."""
        return states @ self.weight

    def decide(self, states: Tensor, positions: Tensor | None) -> Tensor:
        """Return 1 (keep) or 0 for each token of ``states``, ``(sequences, length, hidden)``; all tokens of a record alike.

        Args:
            positions: ``(sequences, length)``, 0 where a record begins; None: each sequence is one record.
        """
        logits = self.logits(states.float())
        records = torch.zeros_like(logits, dtype=torch.int64)
        if positions is not None:
            records = (positions.expand(logits.shape) == 0).long().cumsum(1)
        zeros = logits.new_zeros(len(logits), int(records.max()) + 1, dtype=torch.float32)  # in bf16 a GPU counts to 256

        def sums(values: Tensor) -> Tensor:
            return zeros.scatter_add(1, records, values.float()).to(values.dtype)

        means = sums(logits) / sums(torch.ones_like(logits)).clamp(min=1)
        soft = torch.sigmoid(means.gather(1, records))
        return (soft >= 0.5).float() + (soft - soft.detach())

    def around(self, layer: nn.Module, forward: Callable[..., Any], inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        states = inputs[0] if inputs else keywords["hidden_states"]
        gate = self.gate(states, layer, keywords)
        if not gate.requires_grad and self.returns is not None and not gate.any() and self.may_be_left_out(layer, keywords):
            found = self.left_out(states)
            return (found, *[None] * (self.returns - 1)) if self.returns else found
        with self.narrowed(layer, gate):
            output = forward(*inputs, **keywords)
        first, *rest = output if isinstance(output, tuple) else (output,)
        self.returns = None if any(one is not None for one in rest) else (1 + len(rest)) * isinstance(output, tuple)
        gated = self.gated(states, first, gate[..., None].to(first.dtype))
        return (gated, *rest) if isinstance(output, tuple) else gated

    def gate(self, states: Tensor, layer: nn.Module, keywords: dict[str, Any]) -> Tensor:
        """Return 1 (keep) or 0 for each token, ``(sequences, length)``: decided now, or on the prompt that these tokens follow."""
        positions, cache = keywords.get("position_ids"), keywords.get("past_key_values")
        decisions = {} if cache is None else vars(cache).setdefault(DECISIONS, {})
        place = _place(layer)
        decided = decisions.get(place)
        follows = states.shape[1] == 1 or (positions is not None and bool((positions[:, 0] > 0).all()))
        if decided is not None and follows:
            if len(decided) == len(states):
                return decided[:, None].expand(states.shape[:2])  # type: ignore[no-any-return]
            if (decided == decided[0]).all():  # sequences have left
                return decided[:1, None].expand(states.shape[:2])  # type: ignore[no-any-return]
        gate = self.decide(states, positions)
        self.decision = decisions[place] = gate[:, -1].detach()
        return _Charged.apply(gate, self.cost) if self.training and gate.requires_grad else gate  # type: ignore[no-untyped-call,no-any-return]

    def may_be_left_out(self, layer: nn.Module, keywords: dict[str, Any]) -> bool:
        """Whether nobody needs the keys and values of this layer: how long a cache is, is read off the first layer of each kind."""
        cache = keywords.get("past_key_values")
        return cache is None or (_place(layer) > 0 and len({type(one) for one in getattr(cache, "layers", [])}) == 1)

    def narrowed(self, layer: nn.Module, gate: Tensor) -> AbstractContextManager[None]:
        """Within, the layer computes no more than what is kept, as far as that can be told apart."""
        return nullcontext()

    def left_out(self, states: Tensor) -> Tensor:
        """Return what goes on, given what came in, where nobody keeps what the layer gives."""
        return torch.zeros_like(states)

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
