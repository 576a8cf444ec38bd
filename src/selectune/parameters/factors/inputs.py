"""Scores that look at a layer's inputs: what rounding or removing a weight would do to its output.

Knows: second moments of the inputs of linear layers on some records; the error of rounding to a few bits; the optimal-brain-surgeon
importance of an entry; the importance for a domain and for general text together. Does not know: what is done with a score.

Layers see the base's own inputs: nothing is rounded or pruned before them. Stacks of experts have no such inputs.

Sources: *OWQ: Outlier-Aware Weight Quantization*, AAAI 2024, arXiv 2306.02272; *SparseGPT*, ICML 2023, arXiv 2301.00774; *Pruning as a
Domain-specific LLM Extractor* (D-Pruner), NAACL Findings 2024, arXiv 2405.06275.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selectune.errors import UserError
from selectune.models.head import SplitModel
from selectune.parameters.factors.gradients import batch_of, first, gather, rows_of
from selectune.parameters.factors.scores import Scores, Settings, score, weights_of
from selectune.parameters.factors.targets import Target
from selectune.parameters.factors.trial import hooked, in_bfloat16
from selectune.progress import watched

if TYPE_CHECKING:
    from selectune.data import Record
    from selectune.parameters.method import Context


def layers_of(targets: Sequence[Target]) -> Sequence[Target]:
    """Return weights, all of which are those of linear layers.

    Raises:
        UserError: some are stacks of experts, or there is none.
    """
    if not targets or any(len(target.shape) != 2 for target in targets):
        raise UserError("stacks of experts have no inputs of their own to be scored by", field="parameters.targets",
                        expected="`attention`, or a dense base")  # fmt: skip
    return targets


@torch.no_grad()
def input_moments(
    context: Context, targets: Sequence[Target], records: Sequence[Record], whole: bool = False
) -> dict[str, Tensor]:
    """Return, for each linear layer, 2/n times the sum over tokens of the squares of its inputs, ``(inputs,)`` fp32; n counts records.

    Args:
        whole: of their products instead, ``(inputs, inputs)``. Layers with the same input share one tensor.
    """
    modules = {target.name: context.base.model.get_submodule(target.name.removesuffix(".weight")) for target in targets}
    totals: dict[str, Tensor] = {}
    seen: dict[str, Any] = {}

    def add(name: str, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if seen.get("input") is inputs[0]:  # gate and up, or query, key and value
            totals[name] = totals[seen["name"]]
            return
        states = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        with torch.autocast(states.device.type, enabled=False):  # which would round the products to bf16
            more = states.t() @ states if whole else states.square().sum(0)
        totals[name] = totals[name].add_(more) if name in totals else more
        seen.update(input=inputs[0], name=name)

    rows = rows_of(context, records)
    model = context.base.model
    split = SplitModel(model)
    with hooked(modules, add), torch.autocast(model.device.type, torch.bfloat16, enabled=in_bfloat16(context)):
        for row in watched(rows, "following the inputs", context.quiet):
            batch = batch_of(model, [row])
            split.hidden(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
            context.meter.count(forward=row["input_ids"].numel())
            seen.clear()
    scaled: dict[int, Tensor] = {}
    for value in totals.values():
        if id(value) not in scaled:
            scaled[id(value)] = value.mul_(2 / len(rows))
    return totals


def turned(target: Target, weight: Tensor) -> Tensor:
    """Return a matrix, or its scores, as ``(outputs, inputs)``; or back."""
    return weight.t() if target.transposed else weight


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return a matrix ``(outputs, inputs)`` rounded to so many bits, each row between its own least and largest value."""
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(weight.dtype).tiny)
    zero = (-low / step).round()
    return (((weight / step).round() + zero).clamp(0, 2**bits - 1) - zero) * step


@score
def rounding_error(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """H_jj (w - round(w))^2 on general text: what rounding the entry costs the output; summed over a column, OWQ's sensitivity."""
    eligible = layers_of(targets)
    records = first(context.general, settings.examples)
    moments = input_moments(context, eligible, records)
    found = {}
    for target, weight in zip(eligible, weights_of(context, eligible).values(), strict=True):
        matrix = turned(target, weight)
        found[target.name] = turned(target, (matrix - rounded(matrix, settings.bits)).square() * moments[target.name])
    context.examples_scored = max(context.examples_scored, len(records))
    return found


def surgeon(weight: Tensor, moment: Tensor, sparsity: float = 0.52, width: int = 128) -> Tensor:
    """Return w^2 / u^2 of a matrix ``(outputs, inputs)``: the optimal-brain-surgeon importance, u the diagonal of H's inverse's upper factor.

    Columns are gone through in blocks; of each, the least important entries are removed and what that costs is made good in the later
    columns, so their importance is of what they would then be.

    Args:
        moment: H, ``(inputs, inputs)``. sparsity: share of each block that is removed; 0: nothing is.
    """
    diagonal, size = moment.diagonal(), len(moment)
    dead = diagonal == 0  # its weights matter to nothing; in the inverse it counts as 1
    weight = weight.masked_fill(dead, 0)
    damp = 0.01 * diagonal.mean().clamp(min=torch.finfo(moment.dtype).tiny)
    steady = moment + torch.diag(damp + dead)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(steady)), upper=True)
    found = torch.empty_like(weight)
    for start in range(0, size, width):
        end = min(start + width, size)
        own, factor = weight[:, start:end].clone(), upper[start:end, start:end]
        found[:, start:end] = own.square() / factor.diagonal().square()
        count = int(sparsity * own.numel())
        if count == 0:
            continue
        removed = found[:, start:end] <= found[:, start:end].reshape(-1).kthvalue(count).values
        errors = torch.zeros_like(own)
        for column in range(end - start):
            errors[:, column] = torch.where(removed[:, column], own[:, column], 0) / factor[column, column]
            own[:, column:].sub_(errors[:, column, None] * factor[column, column:])
        weight[:, end:].sub_(errors @ upper[start:end, end:])
    return found


@score
def dual_importance(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """|u + F w^2 / 2|, u = g' w and g' = g + 2 penalty step^2 G g^2: importance for the domain, held to what general text needs.

    g and F are the mean gradient and the mean of squares of single examples on the domain, G the surgeon's importance on general text.
    """
    eligible = layers_of(targets)
    names = [target.name for target in eligible]
    moments = input_moments(context, eligible, first(context.general, settings.examples), whole=True)
    domain = gather(context, names, ["mean", "squared"], examples=settings.examples)
    found = {}
    for target, weight in zip(eligible, weights_of(context, eligible).values(), strict=True):
        general = turned(target, surgeon(turned(target, weight), moments[target.name]))
        gradient = domain["mean"].pop(target.name)
        steered = gradient + 2 * settings.penalty * settings.step**2 * general * gradient.square()
        found[target.name] = (steered * weight + domain["squared"].pop(target.name) * weight.square() / 2).abs()
    return found
