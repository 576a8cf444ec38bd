"""SparseLoRA: while low-rank adapters train, only some channels of the frozen MLPs are computed for the tokens that nobody learns.

A small approximation of gate and up (a few singular vectors, made once) says which channels of a block's MLP matter to the context tokens of this
batch; the others are left out for these tokens. Response tokens, the first steps, and the first and last blocks are computed in full, and so
is everything after training: the adapters are plain LoRA.
Knows: the predictor, the choice of channels, which tokens and steps are sparse. Does not know: how adapters are made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from selectune.data.packing import in_records
from selectune.errors import UserError
from selectune.parameters.factors.allocation import best
from selectune.training.policies.low_rank import factors
from selectune.training.policies.policy import Batch, Policy, Stage


class SparseLoRA(Policy):
    """Leaves out channels of the frozen MLPs for context tokens."""

    name: ClassVar[str] = "sparse_lora"
    paper: ClassVar[str] = "SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity, ICML 2025, arXiv 2506.16500"
    summary: ClassVar[str] = (
        "On low-rank adapters: channels of the frozen MLPs are left out for tokens that are not learnt (a step takes a few percent less)."
    )
    departs: ClassVar[str] = (
        "The MLPs only; attention, which the paper thins out less, is computed in full. Which blocks stay dense is a share instead of a search. "
        "Tokens are told apart one by one, so records may be packed. Channels are scored by the context tokens of a pass, the ones they are left "
        "out for, and not by all tokens."
    )
    changes_what_trains: ClassVar[bool] = True

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a block's channels that is left out."""
    rank: Annotated[int, Field(gt=0)] = 8
    """Of the approximation that predicts."""
    dense_steps: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the run, at its beginning, that is computed in full."""
    dense_blocks: Annotated[float, Field(ge=0, lt=0.5)] = 0.17
    """Share of the blocks, at each end of the model, that is always computed in full."""

    def begin(self, stage: Stage) -> None:
        factors(stage, self.name)
        blocks = stage.anatomy.blocks
        edge = round(self.dense_blocks * len(blocks))
        stage.passing["tokens"] = None
        for block in blocks[edge : len(blocks) - edge]:
            unit: Any = getattr(stage.whole.causal.get_submodule(block.prefix), "mlp", None)
            if any(not hasattr(unit, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
                raise UserError(
                    "the MLPs of this base have no gate of its own",
                    field="policy",
                    expected="a base such as Llama, Qwen or Mistral",
                )
            for layer in (unit.gate_proj, unit.up_proj, unit.down_proj):
                _check(layer)
            unit.forward = _thinned(unit, self, stage)

    def loss(self, stage: Stage, batch: Batch, plain: Callable[[], Tensor]) -> Tensor:
        sparse = self.sparsity > 0 and stage.step >= self.dense_steps * stage.steps
        learnt = batch["labels"] != -100
        learnt[:, :-1] |= learnt[:, 1:].clone()  # the state that predicts a response token is at the token before
        context = in_records(batch) & ~learnt
        both = tuple(places.reshape(-1).nonzero().squeeze(-1) for places in (context, learnt))
        # until the next batch, as the backward pass may compute this one again
        stage.passing["tokens"] = both if sparse else None
        return plain()


class Predictor:
    """Low-rank approximations of gate and up, and the channels that they ask for."""

    def __init__(self, unit: Any, rank: int) -> None:
        self.activation = unit.act_fn
        self.gate, self.up = (self._halves(_base(layer).weight, rank) for layer in (unit.gate_proj, unit.up_proj))

    @staticmethod
    def _halves(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        left, values, right = torch.linalg.svd(weight.detach().float().t(), full_matrices=False)
        roots = values[:rank].sqrt()
        return left[:, :rank] * roots, roots[:, None] * right[:rank]

    @torch.no_grad()
    def channels(self, states: Tensor, sparsity: float) -> Tensor:
        """Return the channels of the largest predicted norm over tokens, sorted: all but a share.

        Args:
            states: ``(tokens, hidden)``.
        """
        states = states.float()
        gate, up = (states @ first @ second for first, second in (self.gate, self.up))
        scores = (self.activation(gate) * up).norm(dim=0)
        return best(scores, len(scores) - int(sparsity * len(scores)))


def _base(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _check(layer: Any) -> None:
    """Refuse what the way through some channels does not compute.

    Raises:
        UserError: the layer's adapter has dropout or magnitudes, or its weight is quantised.
    """
    dropout = any(getattr(one, "p", 0) for one in getattr(layer, "lora_dropout", nn.ModuleDict()).values())
    if dropout or len(getattr(layer, "lora_magnitude_vector", ())) or not _base(layer).weight.is_floating_point():
        raise UserError(
            "'sparse_lora' knows no dropout, magnitudes or quantised weights", field="form",
            expected="form: lora, with `dropout: 0` and `magnitude: false`",
        )  # fmt: skip


def _thinned(unit: Any, policy: SparseLoRA, stage: Stage) -> Callable[[Tensor], Tensor]:
    predictor = Predictor(unit, policy.rank)
    dense = type(unit).forward

    def forward(states: Tensor) -> Tensor:
        tokens = stage.passing["tokens"]
        if tokens is None or not unit.training or not torch.is_grad_enabled() or not len(tokens[0]):  # a reference is whole
            return dense(unit, states)
        context, response = tokens
        flat = states.reshape(-1, states.shape[-1])
        thin = sparse_unit(unit, flat[context], predictor.channels(flat[context], policy.sparsity))
        found = thin.new_zeros(len(flat), thin.shape[-1]).index_copy(0, context, thin)  # padding gets nothing
        if len(response):
            found = found.index_copy(0, response, dense(unit, flat[response]).to(thin.dtype))
        return found.view_as(states)

    return forward


def sparse_unit(unit: Any, states: Tensor, channels: Tensor) -> Tensor:
    """Return what a gated unit gives with some of its channels alone.

    Args:
        states: ``(tokens, hidden)``. channels: ``(n,)`` int64.
    """
    gate = _outputs(unit.gate_proj, states, channels)
    up = _outputs(unit.up_proj, states, channels)
    return _inputs(unit.down_proj, unit.act_fn(gate) * up, channels)


def _outputs(layer: Any, states: Tensor, channels: Tensor) -> Tensor:
    """Some outputs of a linear layer and of its adapter."""
    base = _base(layer)
    found = nn.functional.linear(states, base.weight[channels], None if base.bias is None else base.bias[channels])
    if base is not layer:
        down, up, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        found = found + (nn.functional.linear(nn.functional.linear(states.to(down.dtype), down), up[channels]) * scale).to(
            found.dtype
        )
    return found


def _inputs(layer: Any, states: Tensor, channels: Tensor) -> Tensor:
    """A linear layer and its adapter where only some inputs are not zero."""
    base = _base(layer)
    found = nn.functional.linear(states, base.weight[:, channels], base.bias)
    if base is not layer:
        down, up, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        found = found + (nn.functional.linear(nn.functional.linear(states.to(down.dtype), down[:, channels]), up) * scale).to(
            found.dtype
        )
    return found
