"""LoFiT's first step: on a copy, every head's output is scaled by a trained vector under an L1 penalty; the heads whose scales moved most are taken.

What is chosen are the heads' columns of the output projections: the form ``lofit`` adds an offset to each such head, the form ``full`` trains them.
Knows: the scales, their penalty and the ranking. Does not know: how a copy is trained (``factors/trial.py``).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from selectune.adapters.attached import Attachment, attach
from selectune.errors import UserError
from selectune.parameters.factors.patching import output_of
from selectune.parameters.factors.targets import targets
from selectune.parameters.factors.trial import trial
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.precise_sft import key_heads
from selectune.parameters.selection import Part, Selection


class LoFiTHeads(ParameterMethod):
    """The heads that a trained scale singles out."""

    name: ClassVar[str] = "lofit"
    family: ClassVar[str] = "heads-neurons-channels"
    usual_form: ClassVar[str] = "lofit"
    paper: ClassVar[str] = "LoFiT: Localized Fine-tuning on LLM Representations, NeurIPS 2024, arXiv 2406.01563"
    summary: ClassVar[str] = (
        "The k heads whose outputs' scales move most when all are trained under an L1 penalty; meant for the form `lofit`."
    )
    departs: ClassVar[str] = (
        "A fixed number of steps, at a rate that falls to 0 and with clipped gradients, instead of five epochs; scales start at 0 instead of at "
        "random numbers of size 0.001."
    )

    k: Annotated[int, Field(gt=0)] = 24
    """Heads."""
    steps: Annotated[int, Field(gt=0)] = 50
    """Of training the scales."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    """Of the scales."""
    penalty: Annotated[float, Field(ge=0)] = 5e-4
    """Of the sum of the scales' sizes."""

    def select(self, context: Context) -> Selection:
        blocks = context.base.anatomy.blocks
        there = sum(block.heads for block in blocks)
        if self.k > there:
            raise UserError(
                f"{self.k} heads are asked for and the base has {there}", field="parameters.k", expected=f"at most {there}"
            )
        norms = self.scales(context).norm(dim=-1)
        parts = {}
        for number, heads in key_heads(-norms, [block.heads for block in blocks], self.k).items():
            (target,) = (t for t in targets(context.base, "attention_output") if t.block == number)
            size = target.shape[0 if target.transposed else 1] // blocks[number].heads
            lines = torch.tensor([head * size + place for head in heads for place in range(size)])
            parts[target.name] = Part(target.shape, "rows" if target.transposed else "columns", lines)
        return Selection(dict(sorted(parts.items())))

    def scales(self, context: Context) -> Tensor:
        """Return the trained scales (less 1), ``(blocks, heads, head size)`` fp32."""
        base = context.base
        names = [output_of(block) for block in base.anatomy.blocks]
        layers = [base.model.get_submodule(name) for name in names]
        widths = [layer.weight.shape[0 if type(layer).__name__.endswith("Conv1D") else 1] for layer in layers]
        parts = {f"{name}.beside.scale": Part((width,)) for name, width in zip(names, widths, strict=True)}

        def prepare(model: Any) -> None:
            for name, width in zip(names, widths, strict=True):
                attach(model.get_submodule(name), Scale(width))

        def penalise(step: int, trained: dict[str, Tensor]) -> None:
            for value in trained.values():
                if value.grad is not None:
                    value.grad += self.penalty * value.detach().sign()

        done = trial(
            context, Selection(parts), steps=self.steps, learning_rate=self.learning_rate, prepare=prepare, before_step=penalise
        )
        found = [
            done.trained[name].detach().view(block.heads, -1) for name, block in zip(parts, base.anatomy.blocks, strict=True)
        ]
        return torch.stack(found)


class Scale(Attachment):
    """Multiplies a layer's input by ``1 + scale``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width))

    def before(self, layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
        return ((inputs[0] * (1 + self.scale)).to(inputs[0].dtype), *inputs[1:])
