"""ESFT: of a mixture, only the experts train that the data already uses.

The base reads some records; in each block, each expert's relevance is the share of the gate weights (or of the tokens) that falls to it. The
most relevant experts train until together they have the share ``p``; routers, attention, shared experts, norms and embeddings stay.
Knows: relevance, and the shortest prefix that reaches p. Does not know: how routing is counted (``factors/routing.py``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from selectune.parameters.factors.gradients import first
from selectune.parameters.factors.routing import mixtures, routing, selection_of
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection


class ESFT(ParameterMethod):
    """The experts that the data uses most."""

    name: ClassVar[str] = "esft"
    family: ClassVar[str] = "experts"
    paper: ClassVar[str] = "Let the Expert Stick to His Last, EMNLP 2024, arXiv 2407.01906"
    summary: ClassVar[str] = "Of a mixture, the experts that account for a share p of the routing on the training data."
    departs: ClassVar[str] = (
        "Relevance is normalised over the experts of each block, as the paper says (the released script normalises over blocks). The paper's "
        "p is 0.1 for gates and 0.2 for tokens with 64 experts and more; with 4 to 8 experts that is a single one, hence 0.4. Records are "
        "read one by one instead of in sequences of 4096 tokens."
    )

    relevance: Literal["gate", "token"] = "gate"
    """Of an expert: its share of the gate weights, or of the tokens (each token counts once for each of its experts)."""
    p: Annotated[float, Field(gt=0, le=1)] = 0.4
    """The chosen experts of a block have at least this share, and would not without the last of them."""
    examples: Annotated[int, Field(gt=0)] = 64
    """Training records to read, the first by hash of their content."""

    def select(self, context: Context) -> Selection:
        base = context.base
        mixtures(base.anatomy)
        records = first(context.train, self.examples)
        gates, counts = routing(context, records)
        context.examples_scored = len(records)
        shares = {block: _shares(total) for block, total in (gates if self.relevance == "gate" else counts).items()}
        return selection_of(base.model, base.anatomy, {block: prefix(share, self.p) for block, share in shares.items()})


def _shares(total: Tensor) -> Tensor:
    return total / total.sum()


def prefix(shares: Tensor, p: float) -> list[int]:
    """Return the fewest experts, the greatest shares first (ties by number), that together have at least the share p.

    Args:
        shares: ``(experts,)`` fp64, of sum 1. An expert without any share is never taken.
    """
    chosen, reached = [], 0.0
    for expert in shares.argsort(descending=True, stable=True).tolist():
        if reached >= p - 1e-12 or shares[expert] <= 0:
            break
        chosen.append(expert)
        reached += float(shares[expert])
    return sorted(chosen)
