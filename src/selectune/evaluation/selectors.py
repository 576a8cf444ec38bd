"""Selectors of examples compared on one sheet: what a choice gives for its size, and how simple and general choosing is.

Knows: the fraction that is selected, the performance ratio to the full pool, and the ranks of simplicity, flexibility and feasibility ("Take the
essence and discard the dross", NAACL 2025, arXiv 2406.14115); all of it is read from what a choice cost, for every selector alike. Does not know:
how records were chosen, or where scores come from.

The paper counts steps, trained models and dependences by hand. Here they follow from the meter, so that no selector describes itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selectune.meter import Cost


@dataclass(frozen=True)
class Efficiency:
    """What a choice gives for its size."""

    fraction: float
    """Selected over all of the pool (SDF); 1 for the full pool."""
    ratio: float
    """Score after training on the selected over that after training on all (PIR); 1 for the full pool. At a loss, the ratio of the probabilities
    of a right token."""


def efficiency(selected: int, pool: int, score: float, full_score: float, *, is_loss: bool = False) -> Efficiency:
    """Return both ratios.

    Args:
        selected, pool: records or tokens. score, full_score: after training on the selected, and on all. is_loss: they are nats per token.
    """
    if is_loss:
        return Efficiency(selected / pool, math.exp(full_score - score))
    return Efficiency(selected / pool, score / full_score if full_score else math.nan)


@dataclass(frozen=True)
class Feasibility:
    """What a selector needs."""

    trained_models: int
    steps: int
    """Kinds of work: the choice itself, reading with the base, gradients."""
    hyper_parameters: int
    """Those of its own, beside the budget and who answers."""
    model_bound: bool
    """Another base must measure again."""
    data_bound: bool
    """Another pool must train again."""
    asks_outside: bool
    """An endpoint answers."""
    needs_target: bool

    @property
    def simplicity_penalty(self) -> int:
        """``2 * trained models + steps``, less is simpler; everything here can be reproduced, which the paper counts too."""
        return 2 * self.trained_models + self.steps

    @property
    def flexibility_penalty(self) -> int:
        """How many of base, pool and endpoint it depends on, and whether it must know the target."""
        return sum((self.model_bound, self.data_bound, self.asks_outside, self.needs_target))


def feasibility(method: Any, cost: Cost) -> Feasibility:
    """Return what a selector (an :class:`selectune.examples.ExampleMethod`) needed, from what its choice cost."""
    from selectune.inference.responder import Asking

    budget = {"fraction", "count", "by"}
    return Feasibility(
        trained_models=cost.trainings,
        steps=1 + (cost.forward_tokens > 0) + (cost.backward_tokens > 0),
        hyper_parameters=len(type(method).model_fields.keys() - budget - Asking.model_fields.keys()),
        model_bound=cost.forward_tokens > 0,
        data_bound=cost.trainings > 0,
        asks_outside=getattr(method, "by_endpoint", None) is not None,
        needs_target=method.needs_target,
    )


@dataclass(frozen=True)
class Ranks:
    """Places among the selectors of a sheet, 1 for the best; equal ones share a place, and the next follows without a gap."""

    simplicity: int
    flexibility: int
    feasibility: int
    """By the sum of the other two."""


def feasibility_ranks(found: Mapping[str, Feasibility]) -> dict[str, Ranks]:
    """Rank selectors by how feasible they are."""
    simple = _places({name: one.simplicity_penalty for name, one in found.items()})
    flexible = _places({name: one.flexibility_penalty for name, one in found.items()})
    both = _places({name: simple[name] + flexible[name] for name in found})
    return {name: Ranks(simple[name], flexible[name], both[name]) for name in found}


def _places(penalties: Mapping[str, int]) -> dict[str, int]:
    order = sorted(set(penalties.values()))
    return {name: order.index(penalty) + 1 for name, penalty in penalties.items()}
