"""Parts of weights train: rows, columns, square blocks and single entries, experts of a stack, at the cost of the part.

Knows: how a module computes with a frozen weight of which some entries train. The entries are a parameter of their own in fp32,
written into the frozen weight (in its dtype) before each use; only they have a gradient, an optimiser state and a place in a
checkpoint, and everything else stays as it is, bit for bit. The gradient's product has the size of the part: for rows and
columns a thinner product, for blocks one small product each; for scattered entries a sum over the tokens each, or, where that is
slower, one matrix's whole gradient, which is read and freed before the next. Of a layer's input only the columns that the product
meets are kept for it, or nothing where the input is computed again.
Does not know: which entries were chosen, or why.
"""

from __future__ import annotations

import warnings
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from selectune.models.recomputed import is_recomputed
from selectune.parameters.selection import Part, Selection

_PARTS = "_parts_that_train"
ENTRIES = "entries_of_"
"""Before a parameter's name, in the module that holds it: the entries that train."""
SCATTERED = 1 / 16
"""Share of a matrix up to which its entries are summed one by one (fp32 on a CPU: 1 % in a fifth of the product's time, 5 % in a half)."""


def train_entries(model: nn.Module, selection: Selection) -> dict[str, nn.Parameter]:
    """Make the selected entries of a model trainable in place; whatever trained before no longer does.

    Tensors chosen whole train whole, as fp32 copies.

    Returns:
        What trains, by the name of the weight that it is part of.

    Raises:
        KeyError: the model has no such parameter.
    """
    model.requires_grad_(False)
    weights = dict(model.named_parameters())
    made: dict[str, nn.Parameter] = {}
    for name in selection.names():
        weight, part = weights[name], selection.parts[name]
        places = [(module, key) for module in model.modules() for key, value in module._parameters.items() if value is weight]
        if part.form == "whole":
            made[name] = nn.Parameter(weight.detach().float())
            for module, key in places:
                module._parameters[key] = made[name]
            continue
        if part.form == "blocks" and not part.tiles():
            part = part.flat()
        made[name] = nn.Parameter(part.take(weight.detach()).float())
        trained = _Trained(weight, part, made[name])
        for module, key in places:  # a tied weight is in two modules, and so are its entries
            module.register_parameter(f"{ENTRIES}{key}", made[name])
            _become_partial(module, key, trained)
            if part.form == "rows" and weight.dim() > 2 and hasattr(module, "config"):
                config: Any = module.config
                config._experts_implementation = "eager"  # the one that reads its experts one by one
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and made:  # its product takes fp32 gains with states of any dtype, and no others
            for value in module._parameters.values():
                if value is not None:
                    value.data = value.data.float()
    return made


def release_entries(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Undo :func:`train_entries`: nothing trains any more, and the weights hold the values that were trained, rounded to ``dtype``.

    Returns:
        The values as they were, fp32, by the name of the weight that they are part of, in the layout of their part.
    """
    found = {name: value.detach() for name, value in entries(model).items()}
    for name, value in list(model.named_parameters()):
        if value.requires_grad and ENTRIES not in name:
            found[name] = value.detach()
            plain = nn.Parameter(value.detach().to(dtype), requires_grad=False)
            for module in model.modules():
                for key in [key for key, own in module._parameters.items() if own is value]:
                    module._parameters[key] = plain
    for module in model.modules():
        for key, trained in module.__dict__.pop(_PARTS, {}).items():
            trained.current()
            del module._parameters[f"{ENTRIES}{key}"]
            module.__class__ = type(module).__mro__[1]
    return found


def parts(model: nn.Module) -> dict[str, Part]:
    """Return which entries train of the weights of which not all do, by the name of the weight."""
    return {
        f"{name}.{key}": trained.part
        for name, module in model.named_modules()
        for key, trained in getattr(module, _PARTS, {}).items()
    }


def entries(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained entries of parts of weights, by the name of the weight (once, where it is tied)."""
    found, seen = {}, set()
    for name, module in model.named_modules():
        for key, value in module._parameters.items():
            if key.startswith(ENTRIES) and value is not None and id(value) not in seen:
                seen.add(id(value))
                found[f"{name}.{key.removeprefix(ENTRIES)}".removeprefix(".")] = value
    return found


def multiplications(model: nn.Module) -> int:
    """Return the size, for one token, of the products that give the gradients of all that trains."""
    whole = {id(value): value.numel() for value in model.parameters() if value.requires_grad}
    for module in model.modules():
        for part in getattr(module, _PARTS, {}).values():
            whole[id(part.values)] = part.values.numel() if part.product is None else part.product.multiplications()
    return sum(whole.values())


class _Trained:
    """A frozen weight and the entries of it that train."""

    def __init__(self, weight: nn.Parameter, part: Part, values: nn.Parameter) -> None:
        self.weight, self.part, self.values = weight, part, values
        in_fp32 = weight.dtype == torch.float32 and weight.device.type == "cpu"  # bf16 products are faster than sums one by one
        self.product = _Product(part, one_by_one=in_fp32, device=weight.device) if weight.dim() == 2 else None
        self.rows: Tensor | None = None
        if part.form == "rows":
            self.rows = torch.full((part.shape[0],), -1, dtype=torch.int64)
            self.rows[part.index] = torch.arange(len(part.index))

    def rows_on(self, device: torch.device) -> Tensor:
        """Return, for each row of the weight, which of the rows that train it is, -1 for none, ``(rows,)`` int64, on a device."""
        assert self.rows is not None
        self.rows = self.rows.to(device)
        return self.rows

    def current(self) -> Tensor:
        """Return the weight with its entries as they are now, without gradient."""
        weight = self.weight.data  # not seen by autograd: a pass that is computed again may write the same values again
        self.part.put(weight, self.values.detach())
        return weight

    def whole(self) -> Tensor:
        """Return the weight as a function of its entries; for modules that use it in ways of their own."""
        weight = self.current()
        if self.part.form == "columns":
            return weight.index_copy(1, self.part.index_on(weight.device), self.values.to(weight.dtype))
        if self.part.form == "rows":
            return weight.index_copy(0, self.part.index_on(weight.device), self.values.to(weight.dtype))
        places, order = self._flat
        values = self.values.reshape(-1)[order].to(weight.dtype)
        return weight.view(-1).index_copy(0, places, values).view(weight.shape)

    @cached_property
    def _flat(self) -> tuple[Tensor, Tensor]:
        """The places of the entries in the flat weight, rising, and which of the values goes to each."""
        every = torch.arange(self.weight.numel(), device=self.weight.device).view(self.weight.shape)
        places, order = self.part.take(every).reshape(-1).sort()
        return places, order


class _Stack:
    """A stack of experts' weights, read one at a time; those that train are read from their own copies."""

    def __init__(self, trained: _Trained) -> None:
        self._trained, self._weight = trained, trained.current()
        self._own = trained.values.unbind(0)

    def __getitem__(self, expert: Any) -> Tensor:
        assert self._trained.rows is not None
        row = int(self._trained.rows[int(expert)])
        return self._weight[expert] if row < 0 else self._own[row].to(self._weight.dtype)


class _Product:
    """The gradient of a part of a matrix: ``(left.T @ right)``, only where it is asked for.

    ``left`` is ``(tokens, rows)``, ``right`` ``(tokens, columns)``; either may be given only at the rows or columns that
    :attr:`rows` and :attr:`columns` name (all, where they are None).

    Args:
        one_by_one: sum scattered entries one by one where they are few. device: where the products are made; left out, the CPU.
    """

    def __init__(self, part: Part, one_by_one: bool = False, device: torch.device | None = None) -> None:
        self.part = part
        self._sampled: _Sampled | None = None
        self.rows: Tensor | None = None
        self.columns: Tensor | None = None
        index, (down, across) = part.index if device is None else part.index_on(device), part.shape
        if part.form == "rows":
            self.rows = index
        elif part.form == "columns":
            self.columns = index
        elif part.form == "elements":
            rows, columns = (index // across).unique(), (index % across).unique()
            if len(rows) * across <= down * len(columns):
                self.rows, width = rows, across
                place = torch.searchsorted(rows, index // across) * width + index % across
            else:
                self.columns, width = columns, len(columns)
                place = (index // across) * width + torch.searchsorted(columns, index % across)
            self._places = place
            shape = (down if self.rows is None else len(self.rows), across if self.columns is None else len(self.columns))
            if one_by_one and len(index) <= SCATTERED * shape[0] * shape[1]:
                self._sampled = _Sampled(place, shape)
        else:
            step = torch.arange(part.size, device=index.device)
            grid = across // part.size
            columns, self._column_of = (index % grid).unique(return_inverse=True)
            self.columns = (columns[:, None] * part.size + step).view(-1)
            self._row_of = index // grid
            self._dense = 2 * len(index) > len(columns) * (down // part.size)

    def multiplications(self) -> int:
        """Return the size of the product for one token."""
        down, across = self.part.shape
        if self._sampled is not None:
            return len(self.part.index)
        if self.part.form == "blocks" and not self._dense:
            return len(self.part.index) * self.part.size**2
        return (down if self.rows is None else len(self.rows)) * (across if self.columns is None else len(self.columns))

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the gradient of the part's entries, in their layout, in fp32."""
        form, size = self.part.form, self.part.size
        if self._sampled is not None:
            return self._sampled(left, right)
        if form != "blocks":
            gradient = left.t() @ right
            if form == "elements":
                return gradient.reshape(-1)[self._places.to(gradient.device)].float()
            return gradient.float()
        row_of, column_of = self._row_of.to(left.device), self._column_of.to(left.device)
        if self._dense:
            gradient = (left.t() @ right).view(-1, size, right.shape[1] // size, size)
            return gradient.permute(0, 2, 1, 3)[row_of, column_of].float()
        lefts = left.t().reshape(-1, size, len(left))[row_of]
        rights = right.t().reshape(-1, size, len(right))[column_of]
        return torch.bmm(lefts, rights.transpose(1, 2)).float()


class _Sampled:
    """Single entries of ``left.T @ right``, each a sum of its own.

    Args:
        places: ``row * columns + column`` of each entry, rising. shape: rows and columns.
    """

    def __init__(self, places: Tensor, shape: tuple[int, int]) -> None:
        self._shape, self._columns = shape, places % shape[1]
        self._ends = torch.zeros(shape[0] + 1, dtype=torch.int64)
        self._ends[1:] = torch.bincount(places // shape[1], minlength=shape[0]).cumsum(0)
        _say_once_that_sparse_tensors_are_new()

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the entries in the order of their places, fp32."""
        asked = torch.sparse_csr_tensor(self._ends, self._columns, torch.zeros(len(self._columns)), self._shape)
        return torch.sparse.sampled_addmm(asked, left.t().float(), right.float(), beta=0.0).values()


@cache
def _say_once_that_sparse_tensors_are_new() -> None:
    """Let PyTorch say it where nobody hears it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


class _OfEntries(torch.autograd.Function):
    """Passes a layer's output on and, on the way back, takes the gradient of the entries from it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, values: Tensor, product: _Product, transposed: bool) -> Tensor:
        states = inputs.reshape(-1, inputs.shape[-1])
        ctx.met = product.rows if transposed else product.columns
        if ctx.met is not None and not is_recomputed(states):
            states, ctx.met = states[:, ctx.met.to(states.device)], None
        ctx.save_for_backward(states.to(output.dtype))
        ctx.product, ctx.transposed = product, transposed
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (states,) = ctx.saved_tensors
        states = states if ctx.met is None else states[:, ctx.met.to(states.device)]
        outputs = gradients[0].reshape(-1, gradients[0].shape[-1])
        met = ctx.product.columns if ctx.transposed else ctx.product.rows
        outputs = outputs if met is None else outputs[:, met.to(outputs.device)]
        pair = (states, outputs) if ctx.transposed else (outputs, states)
        return gradients[0], None, ctx.product(*pair), None, None


class _OfRows(torch.autograd.Function):
    """The embeddings of tokens, with a gradient for the rows that train."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, tokens: Tensor, values: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows[tokens.reshape(-1)])
        ctx.shape = values.shape
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=gradient.device)
        total.index_add_(0, rows[rows >= 0], gradient[rows >= 0].float())
        return None, None, total, None


def _own(module: Any, key: str) -> _Trained:
    """Return what trains of a module's weight; a copy of a model has copies of its own."""
    found: _Trained = module.__dict__[_PARTS][key]
    return found


def _become_partial(module: nn.Module, key: str, trained: _Trained) -> None:
    """Give a module a class of its own in which the weight ``key`` has entries that train."""
    module.__dict__.setdefault(_PARTS, {})[key] = trained
    kind = type(module)
    plain = kind.forward
    body: dict[str, Any] = {}
    linear = isinstance(module, nn.Linear) or kind.__name__.endswith("Conv1D")
    if linear and key == "weight" and trained.product is not None:
        transposed = not isinstance(module, nn.Linear)

        def forward(self: Any, inputs: Tensor) -> Tensor:
            own = _own(self, key)
            own.current()
            output = plain(self, inputs)
            return _OfEntries.apply(output, inputs.detach(), own.values, own.product, transposed)  # type: ignore[no-untyped-call,no-any-return]

        body["forward"] = forward
    elif type(module) is nn.Embedding and trained.rows is not None:

        def embed(self: Any, tokens: Tensor) -> Tensor:
            own = _own(self, key)
            output = functional.embedding(tokens, own.current(), self.padding_idx)
            return _OfRows.apply(output, tokens, own.values, own.rows_on(tokens.device))  # type: ignore[no-untyped-call,no-any-return]

        body["forward"] = embed
    elif trained.rows is not None and trained.weight.dim() > 2:
        body[key] = property(lambda self: _Stack(_own(self, key)))
    else:
        body[key] = property(lambda self: _own(self, key).whole())
    module.__class__ = type(f"Partial{kind.__name__}", (kind,), body)
