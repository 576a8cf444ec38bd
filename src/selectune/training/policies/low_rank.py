"""The low-rank adapters of a model that trains.

Knows: where a layer keeps its two factors. Does not know: what is done with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from selectune.errors import UserError
from selectune.training.policies.policy import Stage


@dataclass(frozen=True)
class Factors:
    """A layer's product ``up @ down`` of two factors."""

    layer: nn.Module
    """PEFT's layer around the base's."""
    down_name: str
    """Name of ``down`` among what trains."""
    down: nn.Parameter
    """``(rank, inputs)``, LoRA's A."""
    up_name: str
    up: nn.Parameter
    """``(outputs, rank)``, LoRA's B."""


def factors(stage: Stage, policy: str) -> dict[str, Factors]:
    """Return the factors that train, by the name of their layer.

    Raises:
        UserError: there are none.
    """
    modules = {name.removeprefix("base_model.model."): module for name, module in stage.whole.model.named_modules()}
    found = {}
    for name, module in modules.items():
        down, up = f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
        if down in stage.parameters and up in stage.parameters:
            found[name] = Factors(module, down, stage.parameters[down], up, stage.parameters[up])
    if not found:
        raise UserError(f"'{policy}' acts on low-rank adapters, and none train", field="policy", expected="form: lora")
    return found
