"""The layers that quantising hurts most: where a product in few bits strays farthest from the full one.

Knows: the error of each linear layer under rounding to a few bits. Does not know: in which form the layers are then tuned.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from selectune.parameters.factors.allocation import best
from selectune.parameters.factors.gradients import batch_of, first, rows_of
from selectune.parameters.factors.trial import hooked
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection
from selectune.progress import watched


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """Return a matrix rounded to ``2^bits - 1`` even steps, symmetric about 0, with a scale for each group of inputs, in fp32.

    Args:
        weight: ``(outputs, inputs)``. group: inputs that share a scale; the last group may have fewer.
    """
    outputs, inputs = weight.shape
    group = min(group, inputs)
    padded = torch.nn.functional.pad(weight.float(), (0, -inputs % group)).view(outputs, -1, group)
    most = 2 ** (bits - 1) - 1
    scale = padded.abs().amax(-1, keepdim=True) / most
    steps = (padded / scale.clamp(min=1e-12)).round().clamp(-most, most)
    return (steps * scale).view(outputs, -1)[:, :inputs]


class QuantisationCritical(ParameterMethod):
    """The linear layers with the largest relative output error."""

    name: ClassVar[str] = "quantisation_critical"
    family: ClassVar[str] = "modules"
    paper: ClassVar[str] = (
        "QuEST: Low-bit Diffusion Model Quantization via Efficient Selective Finetuning, ICCV 2025, arXiv 2402.03666"
    )
    summary: ClassVar[str] = "The linear layers whose output errs most when the base is rounded to few bits."
    departs: ClassVar[str] = (
        "The rule for layers hurt by low bits, on a language model; time embeddings and activation scales belong to diffusion models. Rounding is "
        "to even steps with a scale for a group of inputs. What is trained on is the run's objective, not the full model's outputs layer by layer. "
        "Routers and stacks of experts are not ranked."
    )

    ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the linear layers that trains, by number."""
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    """Of a rounded weight."""
    group: Annotated[int, Field(gt=0)] = 64
    """Inputs that share a scale."""
    examples: Annotated[int, Field(gt=0)] = 16
    """Training records to measure on, the first by hash of their content."""

    def select(self, context: Context) -> Selection:
        errors = self.errors(context)
        names, count = list(errors), max(1, round(self.ratio * len(errors)))
        chosen = best(torch.tensor([errors[name] for name in names], dtype=torch.float64), count).tolist()
        for block in context.base.anatomy.blocks:
            context.block_scores[block.index] = max((errors[name] for name in block.linears if name in errors), default=0.0)
        return Selection.of(context.base.model, [f"{names[place]}.weight" for place in chosen])

    @torch.no_grad()
    def errors(self, context: Context) -> dict[str, float]:
        """Return ``||W x - W_q x|| / ||W x||`` of each linear layer of the blocks but routers, over all tokens of the records."""
        model = context.base.model
        layers = [layer for block in context.base.anatomy.blocks for layer in block.linears.items()]
        modules = {name: model.get_submodule(name) for name, role in layers if role != "router"}
        modules = {name: module for name, module in modules.items() if module.weight.is_floating_point()}
        turned = {name for name, module in modules.items() if type(module).__name__.endswith("Conv1D")}
        wrong, whole = dict.fromkeys(modules, 0.0), dict.fromkeys(modules, 0.0)
        records = first(context.train, self.examples)
        rows = rows_of(context, records)

        def measure(name: str, module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            weight = (module.weight.t() if name in turned else module.weight).float()
            states = inputs[0].reshape(-1, weight.shape[1]).float()
            with torch.autocast(states.device.type, enabled=False):  # which would round the products to bf16
                wrong[name] += float((states @ (weight - rounded(weight, self.bits, self.group)).t()).square().sum())
                whole[name] += float((states @ weight.t()).square().sum())

        with hooked(modules, measure), torch.autocast(model.device.type, torch.bfloat16, enabled=context.bfloat16):
            for row in watched(rows, "measuring errors", context.quiet):
                batch = batch_of(model, [row])
                model.base_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
                context.meter.count(forward=len(row["input_ids"]))
        context.examples_scored = len(records)
        return {name: (wrong[name] / whole[name]) ** 0.5 if whole[name] else 0.0 for name in modules}
