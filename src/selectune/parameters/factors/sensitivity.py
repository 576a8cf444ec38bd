"""How strongly a whole tensor or block answers to some records: numbers, not entries.

Knows: squared norms of gradients, mean absolute gradients and signal-to-noise ratios, one number a tensor, without keeping a gradient.
Does not know: what is chosen by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from selectune.parameters.factors.gradients import each_gradient, rows_of

if TYPE_CHECKING:
    from selectune.data import Record
    from selectune.parameters.method import Context


@dataclass
class Sensitivity:
    """Of one tensor, summed over passes; ``g`` is the gradient of a pass's mean response loss."""

    passes: int = 0
    """How many: another number of records makes another number of them."""
    squares: float = 0.0
    """||g||^2."""
    absolute: float = 0.0
    """Mean of |g| over the entries."""
    signal_to_noise: float = 0.0
    """mean(g)^2 / std(g) over the entries."""


def sensitivities(
    context: Context, names: Iterable[str], records: Sequence[Record], packed: bool = True
) -> dict[str, Sensitivity]:
    """Return each tensor's sensitivity to some records at the base's weights, each pass by itself (packed records, or one)."""
    found = {name: Sensitivity() for name in names}

    def add(name: str, gradient: Tensor, tokens: int) -> None:
        gradient, one = gradient / max(tokens, 1), found[name]
        one.passes += 1
        one.squares += float(gradient.square().sum(dtype=gradient.dtype))
        one.absolute += float(gradient.abs().mean())
        spread = float(gradient.std(correction=0))
        one.signal_to_noise += float(gradient.mean()) ** 2 / spread if spread > 0 else 0.0

    each_gradient(context.base.model, rows_of(context, records, packed), found, add, meter=context.meter,
                  bfloat16=context.bfloat16, quiet=context.quiet)  # fmt: skip
    context.examples_scored = max(context.examples_scored, len(records))
    return found
