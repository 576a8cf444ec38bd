"""What trains is chosen anew as training goes on.

Knows: when, how the entries are exchanged under a running optimiser, and which entries were ever touched. Does not know: how a choice is
made; that is any method of choosing parameters.

A value that leaves is rounded once to the base's dtype; one that stays keeps its fp32 value and its moments, and what is new starts with
moments of zero. The step counter of the optimiser goes on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from selectune import catalogue
from selectune.errors import UserError
from selectune.parameters import Selection
from selectune.parameters.method import ParameterMethod
from selectune.parameters.selection import Part
from selectune.training import processes
from selectune.training.partial import ENTRIES, release_entries, train_entries
from selectune.training.policies.policy import Policy, Stage


class Refresh(Policy):
    """Chooses anew every so many steps, from the weights as they are then."""

    name: ClassVar[str] = "refresh"
    paper: ClassVar[str] = (
        "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction, ICML 2025, arXiv 2506.00772 (its renewal; also the "
        "dynamic masks of SPEFT, FisherTune and GreenTrainer)"
    )
    summary: ClassVar[str] = "Chooses anew which weights train every so many steps."
    departs: ClassVar[str] = "A weight of which nothing trained before starts with the others' step counter."
    keeps_base: ClassVar[bool] = True
    changes_what_trains: ClassVar[bool] = True

    parameters: str | dict[str, Any] | None = None
    """The method that chooses; left out: the run's."""
    every: Annotated[int, Field(gt=0)] = 100
    """Steps between two choices."""
    carry: bool = True
    """Entries that stay keep the optimiser's state; off: all start anew."""
    time: Annotated[float, Field(gt=0)] = 100.0
    """Steps in a unit of time, for methods whose budget grows with ``time``."""

    def for_run(self, parameters: str | dict[str, Any]) -> Policy:
        return self if self.parameters is not None else self.model_copy(update={"parameters": parameters})

    def method(self, step: int) -> ParameterMethod:
        """Return the method as of some step."""
        made: Any = catalogue.create("parameters", self.parameters or "all", "policy.parameters")
        found: ParameterMethod = made.model_copy(update={"time": step / self.time}) if "time" in type(made).model_fields else made
        return found

    def begin(self, stage: Stage) -> None:
        if hasattr(stage.whole.model, "disable_adapter"):
            raise UserError("adapters stay where they are", field="policy", expected="form: full")
        if processes.count() > 1:
            raise UserError("what trains cannot be exchanged among several processes", field="policy", expected="processes: 1")
        assert stage.context is not None, "choosing needs the records"
        stage.passing["base"] = {name: value.clone() for name, value in _weights(stage).items()}
        parts = {name: stage.parts.get(name, Part(tuple(value.shape))) for name, value in stage.parameters.items()}
        stage.passing["chosen"] = Selection(dict(sorted(parts.items())))

    def before_step(self, stage: Stage) -> None:
        if stage.step and stage.step % self.every == 0:
            assert stage.context is not None
            old, parts = dict(stage.parameters), dict(stage.parts)
            values = release_entries(stage.whole.model, stage.context.base.dtype)
            context = replace(stage.context, generator=stage.generator("choice"), block_scores={}, notes=[])
            model, training = stage.whole.model, stage.whole.model.training
            model.eval()  # a score is of the model, not of a draw of its dropout
            with stage.own_attention():
                selection = self.method(stage.step).select(context)
            model.train(training)
            self._train(stage, selection)
            for name, value in stage.parameters.items():
                if name in values:  # those that stay keep what rounding would take
                    weight = stage.passing["weights"][name].detach().float()
                    value.data.copy_(stage.taken(name, _written(weight, values[name], parts.get(name))))
            carry(stage, old, parts, self.carry)

    def _train(self, stage: Stage, selection: Selection) -> None:
        stage.passing["chosen"] = selection
        stage.passing["weights"] = dict(stage.whole.model.named_parameters())
        train_entries(stage.whole.model, selection)
        stage.look()

    def state(self, stage: Stage) -> tuple[dict[str, Tensor], dict[str, Any]]:
        chosen: Selection = stage.passing["chosen"]
        tensors = {f"chosen.{name}": part.index for name, part in chosen.parts.items()}
        weights = _weights(stage)
        for name, part in _changed(stage, weights).parts.items():
            tensors[f"changed.{name}"] = part.flat().index
            tensors[f"values.{name}"] = weights[name].reshape(-1)[part.flat().index]
        return tensors, {name: [part.form, list(part.shape), part.size] for name, part in chosen.parts.items()}

    def restore(self, stage: Stage, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        assert stage.context is not None
        release_entries(stage.whole.model, stage.context.base.dtype)
        for name, weight in stage.whole.model.named_parameters():
            weight.data.copy_(stage.passing["base"][name])
            if f"changed.{name}" in tensors:
                changed, values = (tensors[f"{key}.{name}"].to(weight.device) for key in ("changed", "values"))
                weight.data.view(-1)[changed] = values
        parts = {name: Part(tuple(shape), form, tensors[f"chosen.{name}"], size) for name, (form, shape, size) in numbers.items()}
        self._train(stage, Selection(dict(sorted(parts.items()))))

    def touched(self, stage: Stage) -> Selection:
        assert stage.context is not None
        found = _changed(stage, _weights(stage))
        release_entries(stage.whole.model, stage.context.base.dtype)
        self._train(stage, found)
        return found


def carry(stage: Stage, old: dict[str, nn.Parameter], parts: dict[str, Part], kept: bool = True) -> None:
    """Give the optimiser what trains now, and the moments of the entries that trained before.

    Args:
        old, parts: what trained before, and which entries of weights that was.

    Raises:
        UserError: the optimiser's state is not one number for each entry.
    """
    decays = stage.decays()
    members: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, value in stage.whole.named_parameters():
        if value.requires_grad:
            members[name not in decays].append(value)
    states = {name: stage.optimiser.state.pop(value) for name, value in old.items() if value in stage.optimiser.state}
    for group, inside in zip(stage.optimiser.param_groups, members, strict=True):
        group["params"][:] = inside
    for name, value in stage.parameters.items() if kept and states else ():
        like = name if name in states else next(iter(states))
        stage.optimiser.state[value] = fresh = {}
        for key, held in states[like].items():
            if not isinstance(held, Tensor) or held.dim() == 0:
                fresh[key] = held.clone() if isinstance(held, Tensor) else held
            elif held.shape != old[like].shape or not held.is_floating_point():
                raise UserError("this optimiser's state cannot be carried over to other entries", field="training.optimiser",
                                expected="adamw, lion or sgd, or policy.carry: false")  # fmt: skip
            elif like != name:
                fresh[key] = torch.zeros_like(value, dtype=held.dtype)
            else:
                weight = torch.zeros(stage.passing["weights"][name].shape, dtype=held.dtype, device=held.device)
                fresh[key] = stage.taken(name, _written(weight, held, parts.get(name))).clone()


def _written(weight: Tensor, values: Tensor, part: Part | None) -> Tensor:
    """Return a tensor of a weight's shape with the values of a part of it (or of the whole) written into it."""
    (part or Part(tuple(weight.shape))).put(weight, values)
    return weight


def _weights(stage: Stage) -> dict[str, Tensor]:
    """Return all weights as they are, in the base's dtype, with the entries that train written into them."""
    assert stage.context is not None
    found = {}
    for name, value in stage.whole.model.named_parameters():
        if ENTRIES not in name:
            if name in stage.parts:
                stage.parts[name].put(value.data, stage.parameters[name].detach())
            found[name] = value.detach().to(stage.context.base.dtype)
    return found


def _changed(stage: Stage, weights: dict[str, Tensor]) -> Selection:
    """Return the entries that differ from the base's."""
    return Selection({
        name: part for name, value in sorted(weights.items())
        if (part := _part(value != stage.passing["base"][name])) is not None
    })  # fmt: skip


def _part(mask: Tensor) -> Part | None:
    if not mask.any():
        return None
    shape = tuple(mask.shape)
    return Part(shape) if mask.all() else Part(shape, "elements", mask.view(-1).nonzero().squeeze(-1))
