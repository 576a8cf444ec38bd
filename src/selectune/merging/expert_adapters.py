"""Several sets of tuned experts on one mixture, used side by side in one batch.

Knows: that a specialist whose experts alone were trained is the base and a few experts more. The tuned experts are appended to the base's in one
pool for each block, and a map from (adapter, expert) to a place in the pool rewrites the router's choice for each token; gate weights stay as
they are. Memory is the base's and the tuned experts'. Does not know: which experts were trained, or why.

Source: the batched rerouting of ExpertWeave, arXiv 2508.17624; its pages of virtual memory are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from selectune.adapters.form import CHANGED, PLACES, read_origin
from selectune.errors import UserError, nearest
from selectune.models.anatomy import Block
from selectune.parameters.factors.routing import experts_of, mixtures
from selectune.parameters.selection import Part, Selection

if TYPE_CHECKING:
    from selectune.models import Base


class ExpertPool:
    """A mixture with sets of tuned experts; ``None`` names the base.

    The base's model belongs to this object from now on: its stacks of experts grow.
    """

    def __init__(self, base: Base) -> None:
        self.base, self.model = base, base.model
        self._blocks = mixtures(base.anatomy)
        self._numbers: dict[str | None, int] = {None: 0}
        self._places = {block.index: torch.arange(block.experts, device=self.model.device)[None] for block in self._blocks}
        self._tokens: Tensor | None = None
        for block in self._blocks:
            experts_of(self.model, block).register_forward_pre_hook(self._rerouted(block.index))

    def names(self) -> list[str]:
        """Return the sets of tuned experts, in the order in which they came."""
        return [name for name in self._numbers if name is not None]

    def add(self, name: str, folder: str | Path) -> None:
        """Append the tuned experts of a saved specialist.

        Raises:
            UserError: it belongs to another base, changed more than experts, or its name is taken.
        """
        folder = Path(folder)
        read_origin(folder, self.base)
        if name in self._numbers:
            raise UserError(f"there are tuned experts called '{name}' already", file=folder)
        if not (folder / CHANGED).is_file() or not (folder / PLACES).is_file():
            raise UserError(
                "holds no tuned experts",
                file=folder,
                expected="a specialist of which parts of stacks of experts were trained in place",
            )
        parts = Selection.load(folder / PLACES).parts
        inside = {key for block in self._blocks for key in block.expert_parameters}
        for key, part in parts.items():
            if key not in inside or part.form != "rows":
                raise UserError(
                    f"changed '{key}', which all adapters share", file=folder, expected="changes of whole experts only"
                )
        values = load_file(folder / CHANGED)
        for block in self._blocks:
            self._grow(block, parts, values)
        self._numbers[name] = len(self._numbers)

    def _grow(self, block: Block, parts: Mapping[str, Part], values: dict[str, Tensor]) -> None:
        """Append a block's tuned experts to its stacks, and enter their places."""
        changed = {key: parts[key] for key in block.expert_parameters if key in parts}
        tuned = sorted({expert for part in changed.values() for expert in part.index.tolist()})
        module, places = experts_of(self.model, block), torch.arange(block.experts)
        size = module.num_experts
        for key in block.expert_parameters if tuned else ():
            stack = self.model.get_parameter(key).data
            fresh = stack[tuned].clone()
            if key in changed:
                fresh[torch.searchsorted(torch.tensor(tuned), changed[key].index)] = values[key].to(fresh)
            setattr(module, key.rpartition(".")[2], nn.Parameter(torch.cat([stack, fresh]), requires_grad=False))
        places[tuned] = torch.arange(size, size + len(tuned))
        module.num_experts = size + len(tuned)
        self._places[block.index] = torch.cat([self._places[block.index], places[None].to(self.model.device)])

    @contextmanager
    def serving(self, adapters: Sequence[str | None]) -> Iterator[Any]:
        """Within, the model computes each sequence of a batch with its own adapter; without, it is the base.

        Args:
            adapters: one for each sequence of the batches that follow, or for as many in a row (beams) as there are more.

        Raises:
            UserError: none, or an unknown one; a batch that is no multiple of them.
        """
        if not adapters:
            raise UserError(
                "no tuned experts are named", field="adapters", expected="one for each sequence, or None for the base"
            )
        for name in adapters:
            if name not in self._numbers:
                raise UserError(f"no tuned experts are called '{name}'{nearest(str(name), self.names())}", field="adapters",
                                expected=f"one of {', '.join(self.names())}, or None for the base")  # fmt: skip
        self._tokens = torch.tensor([self._numbers[name] for name in adapters], device=self.model.device)

        def look(model: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = named.get("input_ids", named.get("inputs_embeds", inputs[0] if inputs else None))
            if given is not None and len(given) % len(adapters):
                raise UserError(f"{len(given)} sequences come together, and adapters were named for {len(adapters)}", field="adapters",
                                expected="one for each sequence")  # fmt: skip

        handle = self.model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield self.model
        finally:
            handle.remove()
            self._tokens = None

    def _rerouted(self, block: int) -> Any:
        def hook(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._tokens is None:
                return None
            hidden, chosen, *rest = inputs
            number = self._tokens.repeat_interleave(len(chosen) // len(self._tokens))
            return hidden, self._places[block][number[:, None], chosen], *rest

        return hook
