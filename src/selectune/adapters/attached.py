"""Small modules of our own beside a base's layers: what every form of that kind has in common.

Knows: how a module gets into the way through a layer and out of it again, its file, how it is loaded, switched off and folded into the layers'
weights, and where an architecture has room for biases that folding brings. Does not know: any form.

An attachment is a module called ``beside`` within the layer that it belongs to; it sees what goes into the layer and what comes out. It is
built so that a new one changes nothing: the model's logits are then the base's, bit for bit.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from selectune.adapters.form import ATTACHED, Form
from selectune.errors import UserError
from selectune.models.anatomy import Anatomy, Block
from selectune.parameters.selection import Selection

if TYPE_CHECKING:
    from selectune.models import Base

BESIDE = "beside"
Settings = dict[str, Any]


class Attachment(nn.Module):
    """A module beside a layer. Its parameters are fp32; whatever dtype comes in goes out."""

    enabled = True

    def before(self, layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """Act on what goes into the layer; None leaves it."""

    def after(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Act on what comes out of the layer; None leaves it."""

    def around(self, layer: nn.Module, forward: Callable[..., Any], inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Act in the layer's place, which ``forward`` computes."""
        return forward(*inputs, **keywords)

    def fold(self, layer: nn.Module) -> Tensor | None:
        """Put the attachment into the layer's weight, in place.

        Returns:
            What has to be added to the layer's bias, ``(outputs,)``, or None.

        Raises:
            UserError: it cannot be.
        """
        raise UserError("this form is no change of weights: it cannot be merged", field="form", mend="serve it with selectune")

    def _before(self, layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
        return self.before(layer, inputs) if self.enabled else None

    def _after(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return self.after(layer, inputs, output) if self.enabled else None

    def _around(self, layer: nn.Module, forward: Callable[..., Any], *inputs: Any, **keywords: Any) -> Any:
        return self.around(layer, forward, inputs, keywords) if self.enabled else forward(*inputs, **keywords)


class AttachedForm(Form):
    """A form whose trained parameters lie in attachments."""

    @abstractmethod
    def places(self, base: Base, selection: Selection) -> dict[str, Settings]:
        """Return which layers (names of modules) get an attachment, and what JSON can tell about it."""

    @abstractmethod
    def build(self, layer: Any, settings: Settings, seed: int) -> Attachment:
        """Make the attachment of a layer, one that changes nothing."""

    def apply(self, base: Base, selection: Selection, seed: int) -> Any:
        places = self.places(base, selection)
        if not places:
            raise UserError(f"the chosen weights lie beside nothing that '{self.name}' attaches to", field="parameters")
        base.model.requires_grad_(False)
        self._attach(base.model, places, seed)
        return base.model

    def count(self, base: Base, selection: Selection) -> int:
        found = 0
        for number, (name, settings) in enumerate(self.places(base, selection).items()):
            made = self.build(base.model.get_submodule(name), settings, number)
            found += sum(value.numel() for value in made.parameters() if value.requires_grad)
        return found

    def save_tensors(self, model: Any, base: Base, selection: Selection, folder: Path) -> None:
        found = attachments(model)
        tensors = {f"{name}.{key}": value.contiguous() for name, one in found.items() for key, value in one.state_dict().items()}
        save_file(
            tensors, folder / ATTACHED, metadata={"places": json.dumps({name: one.settings for name, one in found.items()})}
        )

    def load(self, base: Base, folder: Path) -> Any:
        """Put saved attachments onto a base (in place) and return the model."""
        with safe_open(folder / ATTACHED, framework="pt") as file:
            places = json.loads(file.metadata()["places"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self._attach(base.model, places, 0)
        for name, one in attachments(base.model).items():
            one.load_state_dict({key: tensors[f"{name}.{key}"] for key in one.state_dict()})
        return base.model

    def _attach(self, model: Any, places: dict[str, Settings], seed: int) -> None:
        for number, (name, settings) in enumerate(places.items()):
            layer = model.get_submodule(name)
            one: Any = self.build(layer, settings, seed * 100_003 + number)
            one.settings = settings
            attach(layer, one)
        model.disable_adapter = partial(_disabled, model)
        model.merge_and_unload = partial(merged, model)


def attach(layer: nn.Module, one: Attachment) -> None:
    """Put an attachment beside a layer."""
    layer.add_module(BESIDE, one.to(next(layer.parameters()).device))
    layer.register_forward_pre_hook(one._before)
    layer.register_forward_hook(one._after)
    if type(one).around is not Attachment.around:
        layer.forward = partial(one._around, layer, layer.forward)  # type: ignore[method-assign]


def attachments(model: nn.Module) -> dict[str, Attachment]:
    """Return a model's attachments by the name of their layer."""
    return {name.removesuffix(f".{BESIDE}"): one for name, one in model.named_modules() if isinstance(one, Attachment)}


@contextmanager
def _disabled(model: nn.Module) -> Iterator[None]:
    """Within, the model is its base."""
    for one in attachments(model).values():
        one.enabled = False
    try:
        yield
    finally:
        for one in attachments(model).values():
            one.enabled = True


@torch.no_grad()
def merged(model: Any) -> Any:
    """Fold all attachments into the weights, in place, and return the plain model.

    Raises:
        UserError: the form cannot be folded, or the architecture has no room for the biases that it brings.
    """
    found = attachments(model)
    shifts = {name: one.fold(model.get_submodule(name)) for name, one in found.items()}
    for name in found:
        layer = model.get_submodule(name)
        del layer._modules[BESIDE]
        for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Attachment)]:
                del hooks[key]
    add_to_biases(model, {name: shift for name, shift in shifts.items() if shift is not None})
    del model.disable_adapter, model.merge_and_unload
    return model


@torch.no_grad()
def add_to_biases(model: Any, shifts: dict[str, Tensor]) -> None:
    """Add to layers' biases, making them where the architecture can have them (``attention_bias``, ``mlp_bias`` in its configuration).

    Raises:
        UserError: it cannot.
    """
    from transformers import AutoModelForCausalLM

    missing = [name for name in shifts if getattr(model.get_submodule(name), "bias", None) is None]
    if missing:
        roles = {name: role for block in Anatomy.of(model).blocks for name, role in block.linears.items()}
        flags = {"mlp_bias" if roles.get(name) in ("gate", "up", "gate_up", "down") else "attention_bias" for name in missing}
        config = type(model.config).from_dict(model.config.to_dict())
        for flag in flags:
            if hasattr(config, flag):
                setattr(config, flag, True)
        with torch.device("meta"):
            room = {
                name.removesuffix(".bias")
                for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()
                if name.endswith(".bias")
            }
        if not set(missing) <= room:
            raise UserError(f"'{missing[0]}' can have no bias in a model of the kind '{config.model_type}', and this form needs one",
                            field="form", mend="serve it with selectune, or choose a form without offsets")  # fmt: skip
        for name in room:
            layer = model.get_submodule(name)
            if getattr(layer, "bias", None) is None:
                outputs = layer.weight.shape[1 if is_transposed(layer) else 0]
                layer.bias = nn.Parameter(layer.weight.new_zeros(outputs), requires_grad=False)
        for flag in flags:
            setattr(model.config, flag, True)
    for name, shift in shifts.items():
        layer = model.get_submodule(name)
        layer.bias.copy_(layer.bias.float() + shift)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer's weight is ``(inputs, outputs)``."""
    return type(layer).__name__.endswith("Conv1D")


def touched(base: Base, selection: Selection) -> list[Block]:
    """Return the blocks in which anything is chosen."""
    return [block for block in base.anatomy.blocks if any(selection.covers(name) for name in block.parameters)]
