"""What a budget of entries means for each method.

Knows: which knob holds a method to a number of entries: its own ``entries``, the number ``k`` of whole blocks, the rank of a form.
Does not know: how entries are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selectune import catalogue
from selectune.experiment.protocol import MethodLine
from selectune.run import Written

if TYPE_CHECKING:
    from selectune.models import Base
    from selectune.parameters import Selection

_OWN = {"entries", "density", "k"}
"""A method's line that names one of these has a budget of its own."""


class Facts(Written):
    """What the experiment knows of its base without loading it."""

    fingerprint: str
    total_parameters: int
    blocks: list[int]
    """Weights in each block."""
    bfloat16: bool


@dataclass(frozen=True)
class Fitted:
    """A method within a budget: every axis as a recipe writes it."""

    parameters: dict[str, Any]
    form: dict[str, Any]
    objective: dict[str, Any]
    policy: dict[str, Any]
    entries_of_form: int | None = None
    """The budget of a form whose rank is fitted when the entries are chosen."""


def entries_of(budget: float, facts: Facts) -> int:
    """Return a budget in entries: a whole number is one, anything else a share of the base's weights."""
    return budget if isinstance(budget, int) else round(budget * facts.total_parameters)


def fit(line: MethodLine, entries: int, facts: Facts) -> Fitted:
    """Hold a method to so many entries: exactly where it can choose entries, else the most whole blocks, or the largest rank, that do not
    exceed them (at least one). A method without such a knob stays as it is."""
    parameters = catalogue.create("parameters", line.parameters or "all")
    form = catalogue.create("adapters", line.form, "form")
    policy = catalogue.create("policies", line.policy, "policy")
    within = None
    if "rank" in type(form).model_fields:
        within = None if "rank" in form.model_fields_set else entries
    elif "entries" in type(parameters).model_fields or "k" in type(parameters).model_fields:
        parameters = _hold(parameters, entries, facts)
    elif "entries" in type(policy).model_fields:
        policy = _hold(policy, entries, facts)
    return Fitted(parameters.describe(), form.describe(), catalogue.create("objectives", line.objective, "objective").describe(),
                  policy.describe(), within)  # fmt: skip


def _hold(method: catalogue.Method, entries: int, facts: Facts) -> catalogue.Method:
    if _OWN & method.model_fields_set:
        return method
    if "entries" in type(method).model_fields:
        return method.model_copy(update={"entries": entries})
    return method.model_copy(update={"k": max(1, min(entries // max(facts.blocks), len(facts.blocks)))})


def fit_rank(form: Any, base: Base, selection: Selection, entries: int) -> Any:
    """Return a form with the largest rank whose count does not exceed so many entries (at least one); alpha keeps its ratio to it."""
    one, two = (form.model_copy(update={"rank": rank}).count(base, selection) for rank in (1, 2))
    rank = max(1, 1 + (entries - one) // (two - one))
    changed = {"rank": rank}
    if hasattr(form, "alpha") and "alpha" not in form.model_fields_set:
        changed["alpha"] = form.alpha * rank / form.rank
    return type(form)(**{**form.model_dump(), **changed})
