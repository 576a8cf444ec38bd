"""What an experiment may say: methods x tasks x budgets x seeds, and the claims that its result decides.

Knows: the keys of the file, their defaults, and the controls that every experiment has. Does not know: how a cell is run, or what
was found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from selectune import catalogue, recipe
from selectune.errors import UserError, nearest
from selectune.parameters.blocks import Blocks
from selectune.recipe import DataRecipe, MethodChoice, Positive, Section, TrainingRecipe

Rate = Annotated[float, Field(gt=0)]
Budget = Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0, le=1)]
Metric = Literal["loss", "choice", "classification", "exact_match"]
RANDOM, RANDOM_BLOCKS = "random", "random_blocks"
EVERY_FORM = "all"
ENDLESS = 1e6
"""Passes over the data, where steps say how long a training is."""


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
    """How the tables call it; alone, the name of a method of the catalogue (weights first, then forms)."""
    paper: str = ""
    """Left out: that of the catalogue."""
    examples: MethodChoice = "all"
    """Which records train; choosing them is charged."""
    parameters: MethodChoice | None = None
    """Left out: every weight."""
    form: MethodChoice = "full"
    """In place, unless said otherwise: only then do the chosen entries train and no others."""
    objective: MethodChoice = "cross_entropy"
    policy: MethodChoice = "none"
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


class Task(DataRecipe):
    """A task: the keys of a recipe's ``data``, the sizes of its splits, and what is measured on it."""

    max_length: Annotated[int, Field(ge=16)] | None = None  # type: ignore[assignment]
    """Left out: that of the experiment's training."""
    dev_fraction: recipe.Fraction = 0.1
    train_records: Positive | None = None
    """At most so many, the first by hash of their content."""
    dev_records: Positive | None = None
    test_records: Positive | None = 100
    metrics: list[Metric] = Field(default_factory=lambda: list[Metric](("loss",)))
    """``loss``: of the right answer, in nats per token. The first is what the gain is read from."""
    max_new_tokens: Positive = 64
    """Of answers that are matched."""

    @model_validator(mode="after")
    def _one_accuracy(self) -> Self:
        if not self.metrics or len(set(self.metrics) - {"loss"}) > 1:
            raise ValueError("a task has the loss, and at most one metric beside it")
        return self

    def data(self, root: str | None, max_length: int) -> DataRecipe:
        """Return the data section of its recipes, with paths under ``root``."""
        values = {key: getattr(self, key) for key in DataRecipe.model_fields}
        for key in ("train", "test", "target"):
            values[key] = _under(root, values[key])
        return DataRecipe(**values | {"max_length": self.max_length or max_length})


class Training(TrainingRecipe):
    """Training, the same for all: the keys of a recipe's ``training``, and the length of a sequence."""

    max_length: Annotated[int, Field(ge=16)] = 512
    """Tokens in one packed sequence."""
    evaluations: Annotated[int, Field(ge=1)] = 1


class Controls(Section):
    """What every method is compared with; each can be left out."""

    random: bool = True
    """As many entries at random; for methods over whole blocks also as many blocks."""
    full_fine_tuning: bool = True
    lora: bool = True
    """The largest rank that the budget holds."""
    last_blocks: bool = True


class Resources(Section):
    """The table of equal memory and seconds."""

    seconds: Annotated[float, Field(gt=0)] | None = None
    """Of choosing and training; each method takes as many steps as fit. Left out: what the random control took."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """A method that needs more is listed as not fitting."""


class Tables(Section):
    """Which tables are made beside the one at equal trained entries and equal steps."""

    resources: Resources | None = None
    """At equal seconds, choosing included, and equal memory; ``{}`` switches it on. One more training a cell."""


class Protocol(Section):
    """The whole experiment."""

    name: str
    base: str = "smollm2-135m-instruct"
    trust_remote_code: bool = False
    data_root: str | None = None
    """Put before the relative paths of tasks."""
    tasks: Annotated[dict[str, Task], Field(min_length=1)]
    methods: list[MethodLine] = Field(default_factory=list)
    controls: Controls = Field(default_factory=Controls)
    budgets: Annotated[list[Budget], Field(min_length=1)] = Field(default_factory=lambda: [0.01])
    """Shares of the base's weights, or whole numbers of entries."""
    seeds: Annotated[list[int], Field(min_length=1)] = Field(default_factory=lambda: [0])
    """The first also tunes the learning rate."""
    learning_rates: dict[str, list[Rate]] = Field(default_factory=dict)
    """One grid for all, or one by form or by method; left out: the form's default alone."""
    training: Training = Field(default_factory=Training)
    tables: Tables = Field(default_factory=Tables)
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    output: str = "runs"

    @model_validator(mode="before")
    @classmethod
    def _one_grid(cls, given: Any) -> Any:
        rates = given.get("learning_rates")
        return {**given, "learning_rates": {EVERY_FORM: rates}} if isinstance(rates, list) else given

    def lines(self) -> list[MethodLine]:
        """Return the controls and the methods, in the order of the tables."""
        controls, chosen = self.controls, list[MethodLine]()
        if controls.random:
            chosen.append(MethodLine(name=RANDOM, parameters=RANDOM))
            if controls.last_blocks or any(map(of_blocks, self.methods)):
                chosen.append(MethodLine(name=RANDOM_BLOCKS, parameters=RANDOM_BLOCKS))
        if controls.full_fine_tuning:
            chosen.append(MethodLine(name="full_fine_tuning", parameters="all"))
        if controls.lora:
            chosen.append(MethodLine(name="lora", form="lora"))
        if controls.last_blocks:
            chosen.append(MethodLine(name="last_blocks", parameters="last_blocks"))
        given = {line.name for line in self.methods}
        return [line for line in chosen if line.name not in given] + self.methods

    def rates(self, line: MethodLine) -> list[float]:
        """Return the learning rates that a method may choose among."""
        form = catalogue.create("adapters", line.form, "form")
        by = self.learning_rates
        found = line.learning_rates or by.get(line.name) or by.get(form.name) or by.get(EVERY_FORM)
        return sorted(set(found or [form.learning_rate_default]))  # type: ignore[attr-defined]

    def training_of(self, line: MethodLine) -> TrainingRecipe:
        """Return how a method trains: as all do, and what its line says otherwise; steps alone are so many steps."""
        shared = {key: getattr(self.training, key) for key in TrainingRecipe.model_fields}
        given = self.training.model_fields_set | line.training.model_fields_set
        if "max_steps" in given and "epochs" not in given:
            shared["epochs"] = ENDLESS
        return TrainingRecipe(**shared | line.training.model_dump(exclude_unset=True))


def of_blocks(line: MethodLine) -> bool:
    """Whether a method chooses whole blocks."""
    return isinstance(catalogue.create("parameters", line.parameters or "all"), Blocks)


def load(file: str | Path) -> Protocol:
    """Read an experiment.

    Raises:
        UserError: an unknown key or method (with the nearest known one) or a wrong value, with its file and line.
    """
    protocol = recipe.check(Protocol, _words(recipe.read_values(file)), file, mend="see docs/experiment.md")
    names = [line.name for line in protocol.methods]
    for number, line in enumerate(protocol.methods):
        _check_method(line, file, number)
        if names.index(line.name) < number:
            raise _wrong(file, ("methods", str(number)), f"a second method is called '{line.name}'", "another name")
    known = ["base", *(line.name for line in protocol.lines())]
    for number, line in enumerate(protocol.methods):
        for claim in line.claim:
            if claim.against not in known:
                raise _wrong(file, ("methods", str(number), "claim"), f"no method is called '{claim.against}'{nearest(claim.against, known)}",
                             f"one of {', '.join(known)}")  # fmt: skip
    grids = [EVERY_FORM, *catalogue.methods("adapters"), *known[1:]]
    for name in protocol.learning_rates:
        if name not in grids:
            raise _wrong(file, ("learning_rates", name), f"neither a form nor a method is called '{name}'{nearest(name, grids)}",
                         f"one of {', '.join(grids)}")  # fmt: skip
    if protocol.training.learning_rate is not None:
        raise _wrong(file, ("training", "learning_rate"), "is tuned", "learning_rates: [...]")
    return protocol


def _words(values: Any) -> Any:
    """Return a file's values with the key ``on`` as it was written (YAML reads it as true), and one claim as a list of one."""
    if isinstance(values, list):
        return [_words(value) for value in values]
    if isinstance(values, dict):
        named = {"on" if key is True else key: _words(value) for key, value in values.items()}
        return {key: [value] if key == "claim" and isinstance(value, dict) else value for key, value in named.items()}
    return values


def _check_method(line: MethodLine, file: str | Path, number: int) -> None:
    axes = {
        "examples": "examples",
        "parameters": "parameters",
        "adapters": "form",
        "objectives": "objective",
        "policies": "policy",
    }
    for axis, key in axes.items():
        try:
            catalogue.create(axis, getattr(line, key) or "all", key)
        except UserError as error:
            place = ("methods", str(number), key)
            raise UserError(error.problem, file=file, line=recipe.line_of(file, place), field=".".join(place),
                            expected=error.expected) from None  # fmt: skip

    known = type(catalogue.create("parameters", line.parameters or "all")).model_fields
    if line.fit is not None and line.fit not in known:
        raise _wrong(file, ("methods", str(number), "fit"), f"'{line.name}' has no hyper-parameter '{line.fit}'{nearest(line.fit, known)}",
                     f"one of {', '.join(known) or 'none'}")  # fmt: skip


def _wrong(file: str | Path, place: tuple[str, ...], problem: str, expected: str) -> UserError:
    return UserError(problem, file=file, line=recipe.line_of(file, place), field=".".join(place), expected=expected)


def _under(root: str | None, source: str | list[str] | None) -> str | list[str] | None:
    if source is None or root is None:
        return source
    if isinstance(source, list):
        return [str(Path(root) / one) for one in source]
    return str(Path(root) / source)
