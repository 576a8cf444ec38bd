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
from selectune.experiment.lines import RANDOM, Axis, Controls, MethodLine, Rate, of_axis, of_blocks
from selectune.experiment.pools import PlantedPool
from selectune.recipe import DataRecipe, MethodChoice, Positive, Section, TrainingRecipe

Budget = Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0, le=1)]
Metric = Literal["loss", "choice", "classification", "exact_match"]
EVERY_FORM = "all"
ENDLESS = 1e6
"""Passes over the data, where steps say how long a training is."""


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
    pool: PlantedPool | None = None
    """What methods choose from; left out: the training records. With a pool, ``train`` gives those of the target that it may hold, and the
    development records."""

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

    def pool_under(self, root: str | None) -> PlantedPool | None:
        """Return its pool, with paths under ``root``."""
        if self.pool is None:
            return None
        moved = {key: [source.model_copy(update={"train": _under(root, source.train)}) for source in getattr(self.pool, key)]
                 for key in ("sources", "off_domain")}  # fmt: skip
        return self.pool.model_copy(update=moved)


class Training(TrainingRecipe):
    """Training, the same for all: the keys of a recipe's ``training``, and the length of a sequence."""

    max_length: Annotated[int, Field(ge=16)] = 512
    """Tokens in one packed sequence."""
    evaluations: Annotated[int, Field(ge=1)] = 1


class Resources(Section):
    """The table of equal memory and seconds."""

    seconds: Annotated[float, Field(gt=0)] | None = None
    """Of choosing and training; each method takes as many steps as fit. Left out: what ``like`` took."""
    like: str = RANDOM
    """The line whose seconds at equal steps are those of all, seed by seed: a dear one leaves time for its rivals to train longer."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """A method that needs more is listed as not fitting."""
    budgets: Annotated[list[Budget], Field(min_length=1)] | None = None
    """Left out: all of the experiment's."""
    seeds: Annotated[list[int], Field(min_length=1)] | None = None
    """Left out: all of the experiment's."""


class Tables(Section):
    """Which tables are made beside the one at equal trained entries and equal steps."""

    resources: Resources | None = None
    """At equal seconds, choosing included, and equal memory; ``{}`` switches it on. One more training a cell."""

    def resources_at(self, budget: float, seed: int) -> bool:
        """Whether a budget and seed stand in the table of equal seconds."""
        table = self.resources
        return table is not None and budget in (table.budgets or [budget]) and seed in (table.seeds or [seed])


class Protocol(Section):
    """The whole experiment."""

    name: str
    base: str = "smollm2-135m-instruct"
    trust_remote_code: bool = False
    data_root: str | None = None
    """Put before the relative paths of tasks."""
    tasks: Annotated[dict[str, Task], Field(min_length=1)]
    axis: Axis = "parameters"
    """What is compared: ways of choosing weights, or of choosing examples. It says what a name alone, a budget and the controls mean."""
    methods: list[MethodLine] = Field(default_factory=list)
    every_method: bool = False
    """Of examples: a line also for each method of the catalogue that no line names."""
    form: MethodChoice | None = None
    """The form of every line that names none."""
    controls: Controls = Field(default_factory=Controls)
    budgets: Annotated[list[Budget], Field(min_length=1)] = Field(default_factory=lambda: [0.01])
    """Shares of the base's weights, or whole numbers of entries; of examples, shares of the pool's trained tokens, or whole numbers of them."""
    seeds: Annotated[list[int], Field(min_length=1)] = Field(default_factory=lambda: [0])
    """The first also tunes the learning rate. Random records have seeds of their own (``controls.random_seeds``)."""
    learning_rates: dict[str, list[Rate]] = Field(default_factory=dict)
    """One grid for all, or one by form or by method; left out: the form's default alone."""
    widen: Annotated[int, Field(ge=0)] = 0
    """So many learning rates are tried beyond a grid, at its own ratio, while the best is at its edge."""
    training: Training = Field(default_factory=Training)
    tables: Tables = Field(default_factory=Tables)
    choosing_minutes: Annotated[float, Field(gt=0)] | None = None
    """A choice that takes longer has failed (weights for several budgets, chosen together: so many minutes for each); left out: as long
    as it takes."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    output: str = "runs"

    @model_validator(mode="before")
    @classmethod
    def _of_all_lines(cls, given: Any) -> Any:
        """One grid is that of every form; what is said of all lines is said of each."""
        rates, methods = given.get("learning_rates"), given.get("methods")
        if isinstance(rates, list):
            given = {**given, "learning_rates": {EVERY_FORM: rates}}
        if isinstance(methods, list):
            lines = [of_axis(line, given.get("axis", "parameters"), given.get("form")) for line in methods]
            given = {**given, "methods": lines}
        return given

    def lines(self) -> list[MethodLine]:
        """Return the controls and the methods, in the order of the tables."""
        if self.axis == "examples":
            controls = self.controls.of_examples(self.form or "full")
        else:
            controls = self.controls.of_parameters(any(map(of_blocks, self.methods)))
        given = {line.name for line in self.methods}
        lines = [line for line in controls if line.name not in given] + self.methods
        if self.axis == "examples" and self.every_method:
            named = {line.name for line in lines} | {"all"}
            others = [name for name in catalogue.methods("examples") if name not in named]
            lines += [MethodLine(name=name, examples=name, form=self.form or "full") for name in others]
        return lines

    def seeds_of(self, line: MethodLine) -> list[int]:
        """Return the seeds of a line, the one that tunes first."""
        if self.axis == "examples" and line.name == RANDOM:
            return list(dict.fromkeys([*self.seeds, *self.controls.random_seeds]))
        return self.seeds

    def rates(self, line: MethodLine) -> list[float]:
        """Return the learning rates that a method may choose among."""
        form = catalogue.create("adapters", line.form, "form")
        by = self.learning_rates
        found = line.learning_rates or by.get(line.name) or by.get(form.name) or by.get(EVERY_FORM)
        chosen: Any = catalogue.create("parameters", line.parameters or "all")
        return sorted(set(found or [chosen.peak_rate(form)]))

    def training_of(self, line: MethodLine) -> TrainingRecipe:
        """Return how a method trains: as all do, and what its line says otherwise; steps alone are so many steps."""
        shared = {key: getattr(self.training, key) for key in TrainingRecipe.model_fields}
        given = self.training.model_fields_set | line.training.model_fields_set
        if "max_steps" in given and "epochs" not in given:
            shared["epochs"] = ENDLESS
        return TrainingRecipe(**shared | line.training.model_dump(exclude_unset=True))


def load(file: str | Path) -> Protocol:
    """Read an experiment.

    Raises:
        UserError: an unknown key or method (with the nearest known one) or a wrong value, with its file and line.
    """
    values = recipe.read_values(file, "experiment", mend="docs/experiment.md shows what one looks like")
    protocol = recipe.check(Protocol, _words(values), file, mend="see docs/experiment.md")
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
    _check_resources(protocol, file, known[1:])
    if protocol.training.learning_rate is not None:
        raise _wrong(file, ("training", "learning_rate"), "is tuned", "learning_rates: [...]")
    return protocol


def _check_resources(protocol: Protocol, file: str | Path, names: list[str]) -> None:
    table, place = protocol.tables.resources, ("tables", "resources")
    if table is None:
        return
    if table.seconds is None and table.like not in names:
        raise _wrong(file, (*place, "like"), f"no method is called '{table.like}'{nearest(table.like, names)}",
                     f"one of {', '.join(names)}, or seconds: …")  # fmt: skip
    for key in ("budgets", "seeds"):
        known = getattr(protocol, key)
        for one in getattr(table, key) or ():
            if one not in known:
                raise _wrong(file, (*place, key), f"{one} is none of the experiment's {key}", ", ".join(map(str, known)))


def _words(values: Any) -> Any:
    """Return a file's values with the key ``on`` as it was written (YAML reads it as true), and one claim as a list of one."""
    if isinstance(values, list):
        return [_words(value) for value in values]
    if isinstance(values, dict):
        named = {"on" if key is True else key: _words(value) for key, value in values.items()}
        return {key: [value] if key == "claim" and isinstance(value, dict) else value for key, value in named.items()}
    return values


def _check_method(line: MethodLine, file: str | Path, number: int) -> None:
    for axis, key in catalogue.KEYS.items():
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
