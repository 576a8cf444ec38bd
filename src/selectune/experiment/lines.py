"""A line of an experiment: a method with what its paper claims, and the controls that stand beside it.

Knows: what a method puts on each axis, how a name alone is read, and the controls of each kind of experiment. Does not know: tasks, budgets
or how a line is run.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from selectune import catalogue
from selectune.parameters.blocks import Blocks
from selectune.recipe import MethodChoice, Section, TrainingRecipe

Rate = Annotated[float, Field(gt=0)]
Axis = Literal["parameters", "examples"]
RANDOM, RANDOM_BLOCKS, EVERY_RECORD = "random", "random_blocks", "every_record"


class Claim(Section):
    """What a paper says, as a rule that an interval decides."""

    text: str
    """The claim in words."""
    better_than: str | None = None
    """Reproduced when the interval of the difference to this method (or ``base``) lies above the margin; opposite when it lies below."""
    no_worse_than: str | None = None
    """Reproduced when the interval lies above minus the margin; opposite when it lies below that."""
    on: Literal["gain", "forgetting", "both"] = "gain"
    """Which difference decides: more gain, less forgetting, or each of them."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """In the units of the gain (nats per token, or a share of items)."""
    tasks: list[str] = Field(default_factory=list)
    """Where it is decided; left out: all tasks and budgets together."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.better_than is None) == (self.no_worse_than is None):
            raise ValueError("a claim needs better_than or no_worse_than, one of them")
        return self

    @property
    def against(self) -> str:
        """The method that is compared with."""
        return self.better_than or self.no_worse_than or ""


class MethodLine(Section):
    """A method: a name alone, or what it puts on each axis; an axis left out takes its default."""

    name: str
    """How the tables call it; alone, the name of a method of the catalogue (weights first, then forms; in an experiment about examples, a way
    of choosing them)."""
    paper: str = ""
    """Left out: that of the catalogue."""
    examples: MethodChoice = "all"
    """Which records train; choosing them is charged."""
    parameters: MethodChoice | None = None
    """Left out: every weight."""
    form: MethodChoice = "full"
    """In place, unless said otherwise (here, or for all lines in the experiment's ``form``): only then do the chosen entries train and no
    others."""
    objective: MethodChoice = "cross_entropy"
    policy: MethodChoice = "none"
    finish: MethodChoice = "none"
    fit: str | None = None
    """The whole-number hyper-parameter of ``parameters`` that is raised until the budget is full; left out: ``entries``, ``k``, or the
    rank of the form, whichever there is."""
    training: TrainingRecipe = Field(default_factory=TrainingRecipe)
    """Only what differs from the experiment's training."""
    learning_rates: list[Rate] = Field(default_factory=list)
    """A grid of its own."""
    claim: list[Claim] = Field(default_factory=list)
    """What its paper says; one, or a list."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        """A name alone is a method for choosing weights, or a form."""
        given = {"name": given} if isinstance(given, str) else given
        if isinstance(given, dict) and given.keys() <= {"name", "claim", "paper", "learning_rates", "training"}:
            short = str(given.get("name", ""))
            known = short.partition(":")[0]
            axis = (
                "form"
                if known in catalogue.methods("adapters") and known not in catalogue.methods("parameters")
                else "parameters"
            )
            given = {**given, axis: short}
        return given


def of_axis(given: Any, axis: Axis, form: Any) -> Any:
    """Return a line as it is written, with what the experiment says of all lines: a name alone is of its axis, and so is the form."""
    line = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, dict) else given
    if not isinstance(line, dict) or (axis == "parameters" and form is None):
        return given
    if axis == "examples" and "examples" not in line:
        line["examples"] = line.get("name")
    return line if form is None else {"form": form, **line}


class Controls(Section):
    """What every method is compared with; each can be left out."""

    random: bool = True
    """As many entries at random (for methods over whole blocks also as many blocks); or as many tokens of records at random."""
    random_seeds: Annotated[list[int], Field(min_length=1)] = Field(default_factory=lambda: [0, 1, 2, 3, 4])
    """Of random records: the band in which one more random choice would lie."""
    full_fine_tuning: bool = True
    lora: bool = True
    """The largest rank that the budget holds."""
    last_blocks: bool = True
    longest: bool = True
    """The longest responses, in an experiment about examples."""
    every_record: bool = True
    """The whole pool, in an experiment about examples."""

    def of_parameters(self, with_blocks: bool) -> list[MethodLine]:
        """Return the controls of an experiment about weights; ``with_blocks``: some method chooses whole blocks."""
        chosen = []
        if self.random:
            chosen.append(MethodLine(name=RANDOM, parameters=RANDOM))
            if self.last_blocks or with_blocks:
                chosen.append(MethodLine(name=RANDOM_BLOCKS, parameters=RANDOM_BLOCKS))
        if self.full_fine_tuning:
            chosen.append(MethodLine(name="full_fine_tuning", parameters="all"))
        if self.lora:
            chosen.append(MethodLine(name="lora", form="lora"))
        if self.last_blocks:
            chosen.append(MethodLine(name="last_blocks", parameters="last_blocks"))
        return chosen

    def of_examples(self, form: MethodChoice) -> list[MethodLine]:
        """Return the controls of an experiment about examples."""
        wanted = ((self.random, RANDOM, "random"), (self.longest, "longest", "longest"), (self.every_record, EVERY_RECORD, "all"))
        return [MethodLine(name=name, examples=method, form=form) for there, name, method in wanted if there]


def of_blocks(line: MethodLine) -> bool:
    """Whether a method chooses whole blocks."""
    return isinstance(catalogue.create("parameters", line.parameters or "all"), Blocks)
