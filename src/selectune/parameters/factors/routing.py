"""Experts: which tokens go to which, and what happens without some of them.

Knows: where a mixture keeps its routers and its experts; the share of the routing that falls to each expert on some records (by gate weights
or by tokens); how experts are switched off; the selection that some experts are. Every record is a pass of its own, so there is no padding to
be counted. Does not know: which experts a method takes.

Mixtures are those whose experts lie in stacks, ``(experts, ...)``, and are called with each token's experts and gate weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from selectune.errors import UserError
from selectune.models.anatomy import Anatomy, Block
from selectune.models.head import SplitModel
from selectune.parameters.factors.gradients import batch_of, rows_of
from selectune.parameters.factors.trial import in_bfloat16
from selectune.parameters.selection import Part, Selection
from selectune.progress import watched

if TYPE_CHECKING:
    from selectune.data import Record
    from selectune.parameters.method import Context

Chosen = Mapping[int, Sequence[int]]
"""Block -> experts."""


def mixtures(anatomy: Anatomy) -> list[Block]:
    """Return the blocks that have routed experts.

    Raises:
        UserError: there is none.
    """
    found = [block for block in anatomy.blocks if block.experts]
    if not found:
        raise UserError("this base has no experts", field="parameters",
                        expected="a mixture of experts; selectune.models.upcycle makes one of a dense base")  # fmt: skip
    return found


def experts_of(model: nn.Module, block: Block) -> Any:
    """Return the module that holds a block's experts."""
    return model.get_submodule(block.expert_parameters[0].rpartition(".")[0])


def router_of(model: nn.Module, block: Block) -> str:
    """Return the name of the module that sends tokens to a block's experts."""
    for name in block.parameters:
        weight = model.get_parameter(name)
        if name.endswith(("gate.weight", "router.weight")) and weight.dim() == 2 and weight.shape[0] == block.experts:
            return name.removesuffix(".weight")
    raise UserError(f"the router of block {block.index} is not found", field="parameters", expected="a mixture such as Mixtral's")


def selection_of(model: nn.Module, anatomy: Anatomy, chosen: Chosen) -> Selection:
    """Return some experts of some blocks as rows of their stacks."""
    parts = {}
    for block in mixtures(anatomy):
        for name in block.expert_parameters if len(chosen.get(block.index, ())) else ():
            parts[name] = Part(tuple(model.get_parameter(name).shape), "rows", torch.tensor(chosen[block.index]))
    return Selection(dict(sorted(parts.items())))


@torch.no_grad()
def routing(
    context: Context, records: Sequence[Record], model: Any = None, responses: bool = False
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return, for each block, the sum of each expert's gate weights and the number of tokens that it gets.

    Args:
        model: the base's, when left out. responses: count the response tokens only.

    Returns:
        Two dictionaries block -> ``(experts,)`` fp64.
    """
    model = context.base.model if model is None else model
    blocks = mixtures(context.base.anatomy)
    gates = {block.index: torch.zeros(block.experts, dtype=torch.float64) for block in blocks}
    counts = {block.index: torch.zeros(block.experts, dtype=torch.float64) for block in blocks}
    kept = torch.empty(0, dtype=torch.bool)

    def listen(block: Block) -> Any:
        def take(module: Any, inputs: tuple[Any, ...]) -> None:
            _, chosen, weights = inputs[:3]
            gates[block.index] += _summed(chosen[kept], weights[kept], block.experts)
            counts[block.index] += _summed(chosen[kept], torch.ones_like(weights[kept]), block.experts)

        return take

    handles = [experts_of(model, block).register_forward_pre_hook(listen(block)) for block in blocks]
    split = SplitModel(model)
    try:
        for row in watched(rows_of(context, records), "following the routers", context.quiet):
            batch = batch_of(model, [row])
            labels = batch["labels"][0]
            kept = labels != -100 if responses else torch.ones_like(labels, dtype=torch.bool)
            with torch.autocast(labels.device.type, torch.bfloat16, enabled=in_bfloat16(context)):
                split.hidden(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
            context.meter.count(forward=len(row["input_ids"]))
    finally:
        for handle in handles:
            handle.remove()
    return gates, counts


def _summed(chosen: Tensor, weights: Tensor, experts: int) -> Tensor:
    total = torch.zeros(experts, dtype=torch.float64, device=chosen.device)
    return total.index_add_(0, chosen.reshape(-1), weights.reshape(-1).double()).cpu()


@contextmanager
def without_experts(model: Any, anatomy: Anatomy, chosen: Chosen) -> Iterator[None]:
    """Within, no token is sent to some experts: their router logits are minus infinity.

    Raises:
        UserError: fewer experts would be left in a block than a token needs.
    """
    with ExitStack() as stack:
        for block in mixtures(anatomy):
            if len(chosen.get(block.index, ())) == 0:
                continue
            router = model.get_submodule(router_of(model, block))
            if block.experts - len(chosen[block.index]) < router.top_k:
                raise UserError(f"block {block.index} would have fewer than {router.top_k} experts left", field="parameters")
            closed = torch.tensor(list(chosen[block.index]), device=router.weight.device)
            handle = router.register_forward_hook(_closed(closed))
            stack.callback(handle.remove)
        yield


def _closed(experts: Tensor) -> Any:
    def route_again(router: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        logits = output[0].index_fill(-1, experts, float("-inf"))
        weights, places = logits.float().softmax(-1).topk(router.top_k, dim=-1)
        if getattr(router, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(output[1].dtype), places

    return route_again
