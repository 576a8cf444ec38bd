"""What a budget of entries, or of tokens, means for each method.

Knows: which knob holds a method to a number of entries: its own ``entries``, the number ``k`` of whole blocks, of heads, of inputs of
each neuron, the rank of a form; and a method of choosing examples to a number of trained tokens.
Does not know: how entries or examples are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selectune import catalogue
from selectune.errors import UserError
from selectune.experiment.lines import MethodLine
from selectune.parameters.blocks import Blocks
from selectune.run import Written

if TYPE_CHECKING:
    from selectune.models import Base
    from selectune.parameters import Selection


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

    examples: dict[str, Any]
    parameters: dict[str, Any]
    form: dict[str, Any]
    objective: dict[str, Any]
    policy: dict[str, Any]
    finish: dict[str, Any]
    entries: int | None = None
    """The budget, where something is left to be fitted once entries are chosen: the form's rank, or ``knob``."""
    knob: str | None = None
    """The hyper-parameter of the method that is raised until the budget is full."""


def entries_of(budget: float, facts: Facts) -> int:
    """Return a budget in entries: a whole number is one, anything else a share of the base's weights."""
    return budget if isinstance(budget, int) else round(budget * facts.total_parameters)


def fit(line: MethodLine, entries: int, facts: Facts) -> Fitted:
    """Hold a method to so many entries: exactly where it can choose entries, else by the most whole blocks, the largest ``k`` (or what the
    line names), or the largest rank, that does not exceed them (at least one). A method with no such knob, or whose line sets it, stays as
    it is."""
    parameters = catalogue.create("parameters", line.parameters or "all")
    form = catalogue.create("adapters", line.form, "form")
    known, given = type(parameters).model_fields, parameters.model_fields_set
    knob = line.fit or ("k" if "k" in known else None)
    within = None
    if "rank" in type(form).model_fields:
        knob, within = None, None if "rank" in form.model_fields_set else entries
    elif "entries" in known:
        knob = None
        if not given & {"entries", "density"}:
            parameters = parameters.model_copy(update={"entries": entries})
    elif isinstance(parameters, Blocks) and "k" not in given:
        knob = None
        parameters = parameters.model_copy(update={"k": max(1, min(entries // max(facts.blocks), len(facts.blocks)))})
    elif knob is None or knob in given:
        knob = None
    else:
        within = entries
    return _fitted(line, catalogue.create("examples", line.examples), parameters, form, within, knob)


def fit_examples(line: MethodLine, budget: float) -> Fitted:
    """Hold a method of choosing examples to a budget of the pool's trained tokens: a whole number is one, anything else a share. One that
    takes every record, or whose line sets a budget, stays as it is; so does everything on the other axes."""
    examples: Any = catalogue.create("examples", line.examples)
    if examples.name != "all" and not examples.model_fields_set & {"fraction", "count"}:
        size = {"count": budget} if isinstance(budget, int) else {"fraction": budget}
        examples = examples.model_copy(update={"by": "tokens", **size})
    return _fitted(
        line, examples, catalogue.create("parameters", line.parameters or "all"), catalogue.create("adapters", line.form, "form")
    )


def _fitted(
    line: MethodLine, examples: Any, parameters: Any, form: Any, entries: int | None = None, knob: str | None = None
) -> Fitted:
    choices = {"objectives": line.objective, "policies": line.policy, "merging": line.finish}
    rest = [catalogue.create(axis, choice) for axis, choice in choices.items()]
    objective, policy, finish = (method.describe() for method in rest)
    return Fitted(examples.describe(), parameters.describe(), form.describe(), objective, policy, finish, entries, knob)


def fit_knob(parameters: Any, knob: str, entries: int, count: Callable[[Any], int]) -> Any:
    """Return a method with the largest value of a hyper-parameter at which it does not exceed so many entries (at least one).

    Args:
        count: entries that a method chooses; about proportional to the hyper-parameter.
    """

    def at(value: int) -> Any:
        return type(parameters)(**{**parameters.model_dump(), knob: value})

    value = max(1, entries // max(1, count(at(1))))
    while value > 1:
        try:
            if count(at(value)) <= entries:
                break
        except UserError:  # more than there is
            pass
        value -= max(1, value // 16)
    return at(value)


def fit_rank(form: Any, base: Base, selection: Selection, entries: int) -> Any:
    """Return a form with the largest rank whose count does not exceed so many entries (at least the least that it takes); alpha keeps its
    ratio to it."""
    step = next((rule.multiple_of for rule in type(form).model_fields["rank"].metadata if hasattr(rule, "multiple_of")), 1)
    one, two = (form.model_copy(update={"rank": rank}).count(base, selection) for rank in (step, 2 * step))
    rank = max(1, 1 + (entries - one) // (two - one)) * step
    changed = {"rank": rank}
    if "alpha" in type(form).model_fields:
        changed["alpha"] = form.alpha * rank / form.rank
    return type(form)(**{**form.model_dump(), **changed})
