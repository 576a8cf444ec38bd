"""Scores of how a weight carries the signal or the gradient: GraSP and SynFlow.

Knows: a Hessian times a vector by a second backward pass; a network made linear and positive. Both work on a copy of the base.
Does not know: what is done with a score.

Sources: *Picking Winning Tickets Before Training by Preserving Gradient Flow*, ICLR 2020, arXiv 2002.07376; *Pruning neural networks without
any data by iteratively conserving synaptic flow*, NeurIPS 2020, arXiv 2006.05467; both as *Refining Salience-Aware Sparse
Fine-Tuning*, ACL 2025, arXiv 2412.13488, uses them: the highest are chosen.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from selectune.models.head import SplitModel
from selectune.parameters.factors.gradients import batch_of, first, rows_of
from selectune.parameters.factors.scores import Scores, Settings, score
from selectune.parameters.factors.targets import Target
from selectune.progress import watched

if TYPE_CHECKING:
    from selectune.parameters.method import Context


@score
def grasp(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """w Hg, signed: how much of the gradient's flow hangs on the weight; g0 of logits divided by the temperature, H of the plain loss."""
    model = _copy(context, torch.float32)
    parameters = dict(model.named_parameters())
    weights = [parameters[target.name].requires_grad_(True) for target in targets]
    records = first(context.train, settings.examples)
    rows = rows_of(context, records)
    goal = [torch.zeros_like(weight) for weight in weights]
    flow = [torch.zeros_like(weight) for weight in weights]
    with sdpa_kernel(SDPBackend.MATH):  # the one that can be differentiated twice
        for row in watched(rows, "scoring", context.quiet):
            found = torch.autograd.grad(_loss(model, row, settings.temperature), weights, allow_unused=True)
            for total, one in zip(goal, found, strict=True):
                total.add_(0 if one is None else one, alpha=1 / len(rows))
        for row in watched(rows, "scoring", context.quiet):
            found = torch.autograd.grad(_loss(model, row), weights, create_graph=True, allow_unused=True)
            product = torch.stack([(one * kept).sum() for one, kept in zip(found, goal, strict=True) if one is not None]).sum()
            for total, one in zip(flow, torch.autograd.grad(product, weights, allow_unused=True), strict=True):
                total.add_(0 if one is None else one, alpha=1 / len(rows))
            context.meter.count(forward=2 * row["input_ids"].numel(), backward=3 * row["input_ids"].numel())
    context.examples_scored = max(context.examples_scored, len(records))
    return {t.name: weight.detach() * total for t, weight, total in zip(targets, weights, flow, strict=True)}


def _copy(context: Context, dtype: torch.dtype) -> Any:
    """Return a frozen copy of the base; experts by the code that takes any dtype and can be differentiated twice."""
    model = copy.deepcopy(context.base.model).to(dtype).requires_grad_(False)
    model.config._experts_implementation = "eager"
    return model


def _loss(model: Any, row: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """Return a record's mean loss over its response tokens, with logits divided by a temperature."""
    split, batch = SplitModel(model), batch_of(model, [row])
    hidden = split.hidden(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    labels = batch["labels"][0, 1:]
    kept = (labels != -100).nonzero().squeeze(-1)
    return cross_entropy(split.logits(hidden[0, kept]) / temperature, labels[kept])


@score
def synflow(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """|w dR/dw|, R the sum of the logits when every weight is |w|, activations do nothing and the input is one vector of ones; in fp64.

    With a single position attention passes the value on, so queries and keys score 0. A norm divides by a constant, its input's
    present size: with norms that do nothing, thirty gated blocks, each of which squares its input, exceed any number format.
    """
    model = _copy(context, torch.float64)
    for name, module in list(model.named_modules()):
        if type(module).__module__ in ("transformers.activations", "torch.nn.modules.activation"):
            model.set_submodule(name, nn.Identity())
    for name in {*context.base.anatomy.norms, *(norm for block in context.base.anatomy.blocks for norm in block.norms)}:
        model.set_submodule(name.rpartition(".")[0], _ConstantScale())
    for value in model.parameters():
        value.abs_()
    parameters = dict(model.named_parameters())
    weights = [parameters[target.name].requires_grad_(True) for target in targets]
    split = SplitModel(model)
    ones = torch.ones(1, 1, context.base.anatomy.hidden_size, dtype=torch.float64, device=model.device)
    logits = model.get_output_embeddings()(split.hidden(inputs_embeds=ones))
    found = torch.autograd.grad(logits.sum(), weights, allow_unused=True)
    context.meter.count(forward=1, backward=1)
    return {
        target.name: torch.zeros(target.shape, device=weight.device) if one is None else _to_float(weight.detach() * one)
        for target, weight, one in zip(targets, weights, found, strict=True)
    }


def _to_float(value: Tensor) -> Tensor:
    return value.abs().clamp(max=torch.finfo(torch.float32).max).float()


class _ConstantScale(nn.Module):
    """Divides by the root mean square of its input as by a constant."""

    def forward(self, states: Tensor) -> Tensor:
        return states / states.detach().square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(states.dtype).tiny)
