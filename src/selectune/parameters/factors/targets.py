"""Which matrices may be chosen from.

Knows: the weights of a base's blocks by their role, and which way round each lies. Does not know: scores, budgets.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selectune.errors import UserError, nearest

if TYPE_CHECKING:
    from selectune.models import Base
    from selectune.models.anatomy import Block

ATTENTION = ("query_key_value", "query", "key", "value", "attention_output")
MLP = ("gate_up", "gate", "up", "down")
_GROUPS = {"linear": (*ATTENTION, *MLP), "attention": ATTENTION, "mlp": MLP, "gate": ("gate", "gate_up"), "up": ("up", "gate_up"),
           "query": ("query", "query_key_value"), "key": ("key", "query_key_value"), "value": ("value", "query_key_value")}  # fmt: skip
_EXPERT_ROLES = (("gate_up", r"gate_up_proj$"), ("gate", r"(gate_proj|w1)(\.weight)?$"), ("up", r"(up_proj|w3)(\.weight)?$"),
                 ("down", r"(down_proj|w2)(\.weight)?$"))  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A weight that may be chosen from."""

    name: str
    """The parameter's name."""
    shape: tuple[int, ...]
    """``(outputs, inputs)``; ``(inputs, outputs)`` when transposed; ``(experts, ...)`` of a stack of experts."""
    role: str
    block: int
    transposed: bool = False
    """Whether rows are inputs, as in a Conv1D."""

    @property
    def count(self) -> int:
        """How many entries it has."""
        return math.prod(self.shape)


def targets(base: Base, which: str = "linear") -> list[Target]:
    """Return the weights of the blocks that have one of the roles, in the order of the model.

    Args:
        which: ``linear``, ``attention``, ``mlp``, or roles joined by ``+``. A fused matrix (query, key and value in one) counts for
            each of its roles.

    Raises:
        UserError: an unknown role, or one that this base has not.
    """
    known = {*_GROUPS, *_GROUPS["linear"], "router"}
    asked = [part.strip() for part in which.split("+")]
    for part in asked:
        if part not in known:
            raise UserError(f"unknown weights '{part}'{nearest(part, known)}", field="parameters.targets",
                            expected=f"one of {', '.join(sorted(known))}, joined by +")  # fmt: skip
    roles = {role for part in asked for role in _GROUPS.get(part, (part,))}
    weights = dict(base.model.named_parameters())
    found = []
    for block in base.anatomy.blocks:
        for module, role in block.linears.items():
            if role in roles and f"{module}.weight" in weights:
                kind = type(base.model.get_submodule(module)).__name__
                shape = tuple(weights[f"{module}.weight"].shape)
                found.append(Target(f"{module}.weight", shape, role, block.index, kind.endswith("Conv1D")))
        for name in block.expert_parameters:
            role = next((role for role, pattern in _EXPERT_ROLES if re.search(pattern, name)), "")
            if role in roles and all(name != target.name for target in found) and weights[name].dim() > 1:
                found.append(Target(name, tuple(weights[name].shape), role, block.index))
    if not found:
        raise UserError(f"this base has no weights of the kind '{which}'", field="parameters.targets",
                        expected="roles that the base has")  # fmt: skip
    return found


def in_order(target: Target, block: Block) -> None:
    """Check that a matrix of the attention lies head after head, and a fused one query, key and value one after the other.

    Raises:
        UserError: it does not, so that its rows belong to other heads or roles than they seem to.
    """
    rows = target.shape[1 if target.transposed else 0]
    queries, keys = block.heads * block.head_size, block.key_value_heads * block.head_size
    expected = {"query": queries, "key": keys, "value": keys, "query_key_value": queries + 2 * keys}.get(target.role, rows)
    mixed = target.name.endswith("query_key_value.weight")  # GPT-NeoX, BLOOM, Falcon: of each head its query, key and value
    if rows != expected or mixed:
        raise UserError(f"the rows of '{target.name}' are laid out in a way of their own, and what plays a part of a role cannot be told",
                        field="parameters", expected="whole matrices, single entries or rows of this base")  # fmt: skip
