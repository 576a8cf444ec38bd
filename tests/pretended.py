"""A pretended accelerator, for machines without one: its tensors say that they lie on another device and refuse what a GPU's would.

Knows: that tensors of two devices do not meet (but for copies, indices, and numbers of the CPU that are read), that no index of the device
reads a CPU tensor, that a generator draws on its own device alone, that numpy reads the CPU's memory. The values lie on the CPU, whose
kernels compute what they compute there; the device is called ``meta``, the one that every PyTorch has beside the CPU.
Does not know: a GPU's rounding, memory, streams and missing kernels; autocast, which is never on there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("meta")
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


class Pretended(Tensor):
    """A tensor on the accelerator, of values on the CPU; no copy is made."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> Pretended:
        like = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        return Tensor._make_wrapper_subclass(cls, values.shape, device=DEVICE, **like)

    def __init__(self, values: Tensor) -> None:
        self.values_here = values

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _compute(operation, args, kwargs or {})

    def numpy(self, **options: Any) -> Any:
        raise TypeError("numpy cannot read the accelerator's memory; .cpu() copies it")

    # what PyTorch does past __torch_dispatch__

    __array__ = numpy

    def _set_data(self, other: Pretended) -> None:
        Tensor.data.__set__(self, other)
        self.values_here = other.values_here

    data = property(Tensor.data.__get__, _set_data)

    def __getitem__(self, places: Any) -> Any:
        return super().__getitem__(_without_lists(places))

    def __setitem__(self, places: Any, values: Any) -> None:
        super().__setitem__(_without_lists(places), values)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), _copied(self, self.values_here))

    def __repr__(self, **options: Any) -> str:
        return f"Pretended({self.values_here!r})"


class _Everywhere(TorchDispatchMode):
    """Sees operations on CPU tensors too: some make tensors on the accelerator."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _compute(operation, args, kwargs or {})


def _compute(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what is allowed; what comes of it lies where it would."""
    flat = [one for value in (*args, *kwargs.values()) for one in (value if isinstance(value, (list, tuple)) else (value,))]
    there = any(isinstance(one, Pretended) for one in flat)
    to = kwargs.get("device")
    goes_there = torch.device(to) == DEVICE if to else isinstance(args[0], Pretended) if operation in _COPIES else there
    reason = _refused(operation, args, flat, there, goes_there)
    if reason:
        raise RuntimeError(f"{operation}: {reason}")
    if there and operation is _aten._fused_sdp_choice.default:
        return 0  # attention in small operations
    here = _each(_here, args)
    if there and operation is _aten.histc.default:  # a GPU counts integers too
        return Pretended(operation(here[0].float(), *here[1:]).to(here[0].dtype))
    found = operation(*here, **{name: _each(_here, value) for name, value in kwargs.items()})
    if not goes_there:
        return found
    wrapped = _each(lambda one: Pretended(one) if isinstance(one, Tensor) else one, found)
    return return_and_correct_aliasing(operation, args, kwargs, wrapped) if operation._schema.is_mutable else wrapped


def _refused(operation: Any, args: tuple, flat: list[Any], there: bool, goes_there: bool) -> str:
    """Return why an accelerator would refuse an operation; nothing, where it would not."""
    near = [one for one in flat if isinstance(one, Tensor) and not isinstance(one, Pretended)]
    if any(one.is_meta for one in near):
        return "a tensor without values, made where nobody looked"
    if goes_there and any(isinstance(one, torch.Generator) for one in flat):
        return "a CPU generator for the accelerator"
    if not there or operation in _COPIES:
        return ""
    if isinstance(args[0], Tensor) and not isinstance(args[0], Pretended):
        if operation in _INDEXED:
            return "a CPU tensor indexed by the accelerator's"
        if operation._schema.is_mutable:
            return "a result on the CPU"
    if operation in _INDEXED:  # the indices themselves may lie on the CPU
        near = [one for one in args[2:3] if not isinstance(one, Pretended)]
    return "tensors of two devices" if any(one.dim() for one in near) else ""


def _each(change: Any, value: Any) -> Any:
    return type(value)(_each(change, one) for one in value) if isinstance(value, (list, tuple)) else change(value)


def _here(one: Any) -> Any:
    return torch.device("cpu") if isinstance(one, torch.device) else one.values_here if isinstance(one, Pretended) else one


def _without_lists(places: Any) -> Any:
    """Return indices with tensors for lists: those that PyTorch makes of them would have no values."""
    if isinstance(places, list):
        return torch.tensor(places, dtype=None if places else torch.int64)
    return tuple(map(_without_lists, places)) if isinstance(places, tuple) else places


def _copied(like: Tensor, values: Tensor) -> Tensor:
    made = Pretended(values.detach().clone())
    return nn.Parameter(made, like.requires_grad) if isinstance(like, nn.Parameter) else made.requires_grad_(like.requires_grad)


def moved(model: Any) -> Any:
    """Return a model on the accelerator, in place; what is tied stays so."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, value in own.items():
                if value is not None and not isinstance(value, Pretended):
                    own[name] = made.setdefault(id(value), _copied(value, value))
    return model


@contextmanager
def pretended_accelerator() -> Iterator[torch.device]:
    """Within, tensors lie and are made on the accelerator, which is given."""
    tensor, autocast, is_on = torch.tensor, torch.autocast, torch.is_autocast_enabled

    def made(data: Any, *, device: Any = None, **how: Any) -> Tensor:  # on ``meta`` itself it would have no values
        return tensor(data, **how) if device is None else tensor(data, **how).to(device)

    def autocast_here(kind: str, *how: Any, **more: Any) -> Any:
        return nullcontext() if kind == "meta" else autocast(kind, *how, **more)

    with (
        mock.patch("torch.autocast", autocast_here),
        mock.patch("torch.is_autocast_enabled", lambda kind="cpu": kind != "meta" and is_on(kind)),
        mock.patch("torch.tensor", made),
        mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["cpu", "meta"]),
        _Everywhere(),
    ):
        yield DEVICE
