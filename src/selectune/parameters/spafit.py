"""Strata of depth: the lowest blocks frozen, the middle ones by their biases or norms, the highest by attention matrices.

Knows: where the strata begin and what of each trains. Does not know: in which form; a form that puts LoRA beside matrices that are chosen
whole, and trains the rest in place, makes it the paper's.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from selectune.errors import UserError
from selectune.parameters.factors.roles import weights_by_role
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection


class SPAFIT(ParameterMethod):
    """Frozen, then biases (norms where there are none), then attention matrices with all biases."""

    name: ClassVar[str] = "spafit"
    family: ClassVar[str] = "modules"
    usual_form: ClassVar[str] = "sparse_and_low_rank:rank=16,alpha=32"
    paper: ClassVar[str] = (
        "SPAFIT: Stratified Progressive Adaptation Fine-tuning for Pre-trained Large Language Models, 2024, arXiv 2405.00201"
    )
    summary: ClassVar[str] = "Strata of depth: frozen, then biases or norms, then attention matrices (for LoRA beside them)."
    departs: ClassVar[str] = (
        "Bases without biases train their norms in place of them. There is no new task head. The matrices of the highest stratum train in "
        "the run's form, LoRA only in a form that puts adapters beside single matrices. The cut points of the paper are of its encoders; "
        "here they are thirds of the depth. A base whose query, key and value are one matrix trains the parts of it in place, without LoRA. "
        "Which matrices its variants take is from a summary, not from the paper."
    )

    n1: Annotated[int, Field(ge=0)] | None = None
    """Blocks of the frozen stratum; left out: a third of the base's."""
    n2: Annotated[int, Field(ge=0)] | None = None
    """Blocks of the two lower strata together; left out: two thirds."""
    roles: str = "query+value"
    """Matrices of the highest stratum: ``query+value`` (variant I), ``attention`` (more of them), or roles joined by ``+``."""
    small: Literal["auto", "bias", "norm"] = "auto"
    """What trains beside matrices: ``bias``, ``norm``, or biases where there are any and norms elsewhere."""

    def select(self, context: Context) -> Selection:
        model, blocks = context.base.model, context.base.anatomy.blocks
        low = len(blocks) // 3 if self.n1 is None else self.n1
        high = max(low, len(blocks) * 2 // 3) if self.n2 is None else self.n2
        if not low <= high <= len(blocks):
            raise UserError(f"strata end at {low} and {high} and the base has {len(blocks)} blocks", field="parameters.n2",
                            expected=f"0 <= n1 <= n2 <= {len(blocks)}")  # fmt: skip
        biases = [[name for name in block.parameters if name.endswith("bias")] for block in blocks]
        kind = self.small if self.small != "auto" else "bias" if any(biases) else "norm"
        small = biases if kind == "bias" else [list(block.norms) for block in blocks]
        chosen = Selection.of(model, [name for names in small[low:] for name in names])
        if high < len(blocks):
            chosen = chosen | weights_by_role(context.base, self.roles, biases=False, blocks=range(high, len(blocks)))
        if not chosen.parts:
            raise UserError(
                f"nothing trains: these strata have no {kind}", field="parameters.small", mend="set `n2` lower, or `small: norm`"
            )
        return chosen
