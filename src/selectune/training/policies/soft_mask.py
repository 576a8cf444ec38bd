"""What general predictions hang on is updated less: a soft mask from two dropout passes.

Knows: the importance of channels, outputs and heads for the model's own predictions, and the rows of weights that they scale. Does not
know: how a factor is applied, or which blocks train.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from selectune.data.packing import in_records
from selectune.errors import UserError
from selectune.models.anatomy import Block
from selectune.parameters.factors.targets import Target, in_order
from selectune.training.policies.dropout import branches, dropping
from selectune.training.policies.masked import Masked
from selectune.training.policies.policy import Batch, Stage

_OUTPUTS = ("up", "gate_up", "down")
_HEADS = ("query_key_value", "query", "key", "value")
Shapes = dict[str, tuple[tuple[int, ...], bool]]


class SoftMask(Masked):
    """Scales updates of MLP rows (and attention heads) by one minus their importance."""

    name: ClassVar[str] = "soft_mask"
    paper: ClassVar[str] = (
        "Balancing Speciality and Versatility: a Coarse to Fine Framework for Supervised Fine-tuning Large Language Model, "
        "Findings of ACL 2024, arXiv 2404.10306"
    )
    summary: ClassVar[str] = "Rows that the model's own predictions hang on are updated less."
    departs: ClassVar[str] = (
        "The mask lies along the rows of a weight (the released code repeats it along the flat gradient) and scales the update, since Adam "
        "divides a constant factor on the gradient out again. Both branches' outputs are dropped instead of attention's probabilities. Where "
        "gate and up are one matrix, the gate's rows are scaled too."
    )

    mask: Literal["gradient", "update"] = "update"
    """What is scaled: the update, or the gradient as in the paper."""
    heads: bool = False
    """Scale queries, keys and values by the importance of their head too."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.003
    """Makes the two passes differ."""
    examples: Annotated[int, Field(gt=0)] = 64
    """Training sequences that importance is measured on."""

    def before_step(self, stage: Stage) -> None:
        if hasattr(stage.whole.model, "disable_adapter"):
            raise UserError(
                "importance is of the base's own outputs, and adapters train beside them", field="policy", expected="form: full"
            )
        if not stage.tensors:
            stage.tensors = self.measure(stage)

    def measure(self, stage: Stage) -> dict[str, Tensor]:
        """Return the normalised importance, from 0 to 1, of the outputs of each weight that is scaled: ``(outputs,)`` by name."""
        raw: dict[str, Tensor] = {}
        tokens, drop = 0, branches(stage.whole.causal)
        for number, batch in enumerate(stage.sample(self.examples, "importance")):
            with masks(stage, self.heads) as ones, torch.enable_grad():
                if not ones:
                    raise UserError("this base's experts have no rows that are measured", field="policy", expected="a dense base",
                                    mend="`heads: true` measures attention's heads")  # fmt: skip
                gradients = torch.autograd.grad(
                    0.1 * disagreement(stage, batch, drop, self.dropout, number), list(ones.values()), allow_unused=True
                )
            tokens += int(in_records(batch).sum())
            for name, gradient in zip(ones, gradients, strict=True):
                raw[name] = raw.get(name, 0) + (torch.zeros_like(ones[name]) if gradient is None else gradient)
        scaled = {name: normalised(value / tokens) for name, value in raw.items()}
        shapes = _shapes(stage)
        return {weight: row for block in stage.anatomy.blocks for weight, row in self._rows(block, scaled, shapes).items()}

    def _rows(self, block: Block, importance: dict[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """Importance of the outputs of the weights of one block."""
        found = {}
        heads = importance.get(f"{block.prefix}/heads")
        for module, role in block.linears.items():
            if module in importance:
                found[f"{module}.weight"] = importance[module]
            elif heads is not None and role in _HEADS:
                name = f"{module}.weight"
                shape, transposed = shapes[name]
                in_order(Target(name, shape, role, block.index, transposed), block)
                keys = heads.view(block.key_value_heads, -1).amax(1)
                groups = {"query": [heads], "query_key_value": [heads, keys, keys]}.get(role, [keys])
                found[name] = torch.cat(groups).repeat_interleave(block.head_size)
        return found

    def factors(self, stage: Stage) -> dict[str, Tensor]:
        weights = stage.passing.setdefault("shapes", _shapes(stage))
        factors = {}
        for name, importance in stage.tensors.items():
            if name in stage.parameters:
                shape, transposed = weights[name]
                column = (1 - importance).view(1, -1) if transposed else (1 - importance).view(-1, 1)
                factors[name] = stage.taken(name, column.expand(shape)).clone()
        return factors


def normalised(raw: Tensor) -> Tensor:
    """Return ``|tanh|`` of the standard scores; 0 where all are alike."""
    spread = raw.std()
    return torch.tanh((raw - raw.mean()) / spread).abs() if spread > 0 else torch.zeros_like(raw)


def disagreement(stage: Stage, batch: Batch, drop: list[nn.Module], share: float, number: int = 0) -> Tensor:
    """Return the divergence of a second dropout pass from a first, a mean over the records' tokens."""
    said, meant = [], in_records(batch)
    for sub_network in (0, 1):
        source = stage.generator(f"soft/{number}/{sub_network}")
        with dropping(drop if share else [], share, source):
            states = stage.states(batch)
        with stage.autocast():
            said.append(stage.whole.split.logits(states[meant]).float().log_softmax(-1))
    return functional.kl_div(said[0], said[1], reduction="batchmean", log_target=True)


@contextmanager
def masks(stage: Stage, heads: bool) -> Iterator[dict[str, Tensor]]:
    """Within, outputs of the MLP's layers (and of heads) are multiplied by vectors of ones that a gradient can be taken of."""
    ones: dict[str, Tensor] = {}
    handles = []

    def vector(name: str, size: int) -> Tensor:
        return ones.setdefault(name, torch.ones(size, device=stage.device, requires_grad=True))

    def outputs(name: str) -> Any:
        return lambda module, inputs, output: output * vector(name, output.shape[-1]).to(output.dtype)

    def per_head(block: Block) -> Any:
        def scale(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            mask = vector(f"{block.prefix}/heads", block.heads).to(inputs[0].dtype).repeat_interleave(block.head_size)
            return (inputs[0] * mask, *inputs[1:])

        return scale

    for block in stage.anatomy.blocks:
        for name, role in block.linears.items():
            module = stage.whole.causal.get_submodule(name)
            if role in _OUTPUTS:
                vector(name, _shape(module)[0])
                handles.append(module.register_forward_hook(outputs(name)))
            elif role == "attention_output" and heads:
                vector(f"{block.prefix}/heads", block.heads)
                handles.append(module.register_forward_pre_hook(per_head(block)))
    try:
        yield ones
    finally:
        for handle in handles:
            handle.remove()


def _shape(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    turned = type(module).__name__.endswith("Conv1D")
    first, second = module.weight.shape
    return (second, first) if turned else (first, second)


def _shapes(stage: Stage) -> Shapes:
    """Shape of each linear layer's weight, and whether its rows are inputs."""
    found = {}
    for block in stage.anatomy.blocks:
        for name in block.linears:
            module: Any = stage.whole.causal.get_submodule(name)
            found[f"{name}.weight"] = (tuple(module.weight.shape), type(module).__name__.endswith("Conv1D"))
    return found
