"""Fixed choices by what a module is for: attention, projections, gate and up, biases, norms, any role in any band of blocks.

Knows: the names of these choices and where they come from. Does not know: which weights play a role (``factors/roles.py``).
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from selectune.errors import UserError
from selectune.parameters.factors.roles import weights_by_role
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection


class AttentionOnly(ParameterMethod):
    """The attention of every block, or one of the two choices that it is compared with."""

    name: ClassVar[str] = "attention_only"
    family: ClassVar[str] = "modules"
    paper: ClassVar[str] = "Three things everyone should know about Vision Transformers, ECCV 2022, arXiv 2203.09795"
    summary: ClassVar[str] = "The attention of every block; the MLPs stay as they are."
    departs: ClassVar[str] = (
        "Language models instead of vision transformers: there is no new task head, and the output matrix, often tied to the embeddings, "
        "stays frozen. Position embeddings train where they are learned, as in the paper."
    )

    variant: Literal["attention", "mlp", "linear"] = "attention"
    """``attention``; its controls are the ``mlp`` of every block, and ``linear``: both."""
    positions: bool = True
    """Learned position embeddings train too, where the base has them."""

    def select(self, context: Context) -> Selection:
        base = context.base
        chosen = weights_by_role(base, self.variant)
        tables = [name for name in base.anatomy.embeddings if re.search(r"(wpe|position)", name)] if self.positions else []
        return chosen | Selection.of(base.model, tables)


class AttentionProjections(ParameterMethod):
    """Query, key, value and output projection of every block."""

    name: ClassVar[str] = "attention_projections"
    family: ClassVar[str] = "modules"
    paper: ClassVar[str] = "How to Teach Large Multimodal Models New Skills, 2025, arXiv 2510.08564"
    summary: ClassVar[str] = "Query, key, value and output projection of every block (SA-Proj): learns with little drift."
    departs: ClassVar[str] = "The base is a language model; the paper tunes the language decoder of a multimodal one."

    output: bool = True
    """With the output projection; without it, the paper's variant of query, key and value alone."""

    def select(self, context: Context) -> Selection:
        return weights_by_role(context.base, "attention" if self.output else "query+key+value")


class GateUp(ParameterMethod):
    """Gate and up of every MLP, with down frozen: what is written stays, when it is written changes."""

    name: ClassVar[str] = "gate_up"
    family: ClassVar[str] = "modules"
    paper: ClassVar[str] = AttentionProjections.paper
    summary: ClassVar[str] = "Gate and up of every MLP; down, which writes into the residual stream, stays frozen."
    departs: ClassVar[str] = f"{AttentionProjections.departs} An MLP without a gate has up alone."

    down: bool = False
    """Down trains too: the whole MLP, the paper's comparison."""

    def select(self, context: Context) -> Selection:
        return weights_by_role(context.base, "mlp" if self.down else "gate+up")


class Biases(ParameterMethod):
    """Every bias, and nothing else."""

    name: ClassVar[str] = "biases"
    family: ClassVar[str] = "modules"
    paper: ClassVar[str] = (
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models, ACL 2022, arXiv 2106.10199"
    )
    summary: ClassVar[str] = "Every bias (BitFit); refused where the base has none, as most recent ones."
    departs: ClassVar[str] = "There is no new task head to train."

    roles: str = "all"
    """Of which layers: ``all`` (norms too), or roles joined by ``+``; ``query+up`` is the paper's smallest good choice."""

    def select(self, context: Context) -> Selection:
        base = context.base
        if self.roles == "all":
            found = Selection.of(base.model, [name for name, _ in base.model.named_parameters() if name.endswith("bias")])
        else:
            weights = weights_by_role(base, self.roles)
            found = Selection({name: part for name, part in weights.parts.items() if name.endswith("bias")})
        if not found.parts:
            raise UserError("this base has no such biases", field="parameters.method", mend="choose `norms`, or another base")
        return found


class Norms(ParameterMethod):
    """The gains (and biases) of every norm."""

    name: ClassVar[str] = "norms"
    family: ClassVar[str] = "modules"
    paper: ClassVar[str] = (
        "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, ICLR 2024, arXiv 2312.11420"
    )
    summary: ClassVar[str] = "The gains of every norm: some thousandths of the base."
    departs: ClassVar[str] = (
        "Nothing but the norms trains; the paper also trains what joins vision to language, and the embeddings."
    )

    final: bool = True
    """The norms outside the blocks too."""

    def select(self, context: Context) -> Selection:
        anatomy = context.base.anatomy
        names = [name for block in anatomy.blocks for name in block.norms] + list(anatomy.norms if self.final else ())
        if not names:
            raise UserError("this base's norms have no weights", field="parameters.method")
        return Selection.of(context.base.model, names)


class Roles(ParameterMethod):
    """The weights of any roles in any band of blocks; the rest keeps what the base knows."""

    name: ClassVar[str] = "roles"
    family: ClassVar[str] = "modules"
    paper: ClassVar[str] = (
        "Fine-Tuning Visual Autoregressive Models for Subject-Driven Generation, ICCV 2025, arXiv 2504.02612; the same choice by role in "
        "EGVD (event-guided video diffusion) and InteractEdit"
    )
    summary: ClassVar[str] = "The weights of any roles (by default the MLPs, with attention frozen) in any band of blocks."
    departs: ClassVar[str] = (
        "These papers tune what conditions images (cross-attention, temporal layers) and freeze what carries the prior; a language model has "
        "no such path, so the roles are a setting, and the default is what of the first paper's choice is left: the MLPs. Its distillation "
        "from the frozen base and its weights by position are not there."
    )

    roles: str = "mlp"
    """``linear``, ``attention``, ``mlp``, or roles joined by ``+``, such as ``value+down``."""
    first: Annotated[int, Field(ge=0)] = 0
    """The first block of the band, counted from 0."""
    last: Annotated[int, Field(ge=0)] | None = None
    """The last block of the band; left out: of the base."""
    biases: bool = True
    """With the biases of these weights."""

    def select(self, context: Context) -> Selection:
        count = len(context.base.anatomy.blocks)
        last = count - 1 if self.last is None else self.last
        if not self.first <= last < count:
            raise UserError(f"blocks {self.first} to {last} are asked for and the base has {count}", field="parameters.first",
                            expected=f"a band within 0 to {count - 1}")  # fmt: skip
        return weights_by_role(context.base, self.roles, biases=self.biases, blocks=range(self.first, last + 1))


class Personalised(ParameterMethod):
    """The menu of fixed subsets for one project's data."""

    name: ClassVar[str] = "personalised"
    family: ClassVar[str] = "modules"
    paper: ClassVar[str] = "Exploring and Evaluating Personalized Models for Code Generation, ESEC/FSE 2022, arXiv 2208.13928"
    summary: ClassVar[str] = "A menu of fixed subsets: everything, embeddings and head, or the last blocks with nothing else."
    departs: ClassVar[str] = (
        "The paper's fourth choice, a prefix of learned keys and values, is no choice of weights and is not here. Learned position embeddings "
        "count as embeddings."
    )

    subset: Literal["all", "embeddings_and_head", "last_blocks"] = "last_blocks"
    """``all``; ``embeddings_and_head``, one matrix where the two are tied; or the ``last_blocks``."""
    k: Annotated[int, Field(gt=0)] = 1
    """How many last blocks."""

    def select(self, context: Context) -> Selection:
        model, anatomy = context.base.model, context.base.anatomy
        if self.subset == "all":
            return Selection.all(model)
        if self.subset == "embeddings_and_head":
            return Selection.of(model, [*anatomy.embeddings, *([anatomy.head] if anatomy.head else [])])
        if self.k > len(anatomy.blocks):
            raise UserError(f"{self.k} blocks are asked for and the base has {len(anatomy.blocks)}", field="parameters.k",
                            expected=f"at most {len(anatomy.blocks)}")  # fmt: skip
        return Selection.of(model, [name for block in anatomy.blocks[-self.k :] for name in block.parameters])
