"""What an experiment leaves on disk, one JSON file for each finished piece of work.

Knows: the folder, the shape of each file, and the fingerprint of all that matters to it, which is its name: a piece whose file is there
is never done again. Does not know: how a piece is done.

    base.json                 Facts of the base
    data/KEY/                 the records of a task, prepared once
    measured/KEY.json         Measured: the base on a task
    choices/KEY.json          Choice: which entries and records, and what choosing took (KEY/ holds them)
    trials/KEY.json           Trial: one training at one learning rate (KEY/ holds the specialist until the best is measured)
    cells/KEY.json            Cell: the best trial of a method, task, budget and seed, measured
    within/KEY.json           Within: how a cell at equal seconds was trained elsewhere, on whose clock the seconds were
    signals/KEY/              signals of a task's records, for all choices that ask for them; each is charged what it took
    errors/KEY.txt            where an unexpected error came from
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from selectune.errors import UserError
from selectune.meter import Cost
from selectune.recipe import TrainingRecipe
from selectune.run import Benchmark, Written, fingerprint, write_atomically

FORMAT = 1
"""Raise it when what a piece of work does changes: everything is then done anew."""


CHOSEN = "selection.safetensors"


class Piece(Written):
    """A finished piece of work, or why it failed."""

    failed: str | None = None
    """In one line."""


class Measured(Piece):
    """What a model was measured to be; items keep their id and value."""

    benchmarks: list[Benchmark] = Field(default_factory=list)


class Choice(Piece):
    """Which entries of which weights may change, and which records train."""

    parameters: dict[str, Any] = Field(default_factory=dict)
    form: dict[str, Any] = Field(default_factory=dict)
    """Both as the budget holds them."""
    entries: int = 0
    records: int = 0
    """That train, chosen or all."""
    tokens: int = 0
    """Of their responses."""
    kept: dict[str, float] = Field(default_factory=dict)
    """Of a pool: the share kept of each kind of planted records."""
    cost: Cost = Cost(stage="choose")


class Trial(Piece):
    """One training."""

    learning_rate: float
    dev_loss: float | None = None
    steps: int = 0
    entries: int = 0
    """Values in the specialist's file: what was trained in truth."""
    cost: Cost = Cost(stage="train")
    step_seconds: float = 0.0


class Within(Piece):
    """With what a cell was trained for the seconds of a table."""

    learning_rate: float
    steps: int


class Cell(Piece):
    """A method at a task, within a budget, with a seed."""

    table: str
    """``entries`` or ``resources``."""
    method: str
    task: str
    budget: float
    seed: int
    budget_entries: int = 0
    entries: int = 0
    """Those that trained."""
    records: int = 0
    tokens: int = 0
    kept: dict[str, float] = Field(default_factory=dict)
    """As of its choice."""
    learning_rate: float | None = None
    grid: dict[str, float | str] = Field(default_factory=dict)
    """Learning rate -> development loss, or why it failed."""
    steps: int = 0
    choose: Cost = Cost(stage="choose")
    train: Cost = Cost(stage="train")
    step_seconds: float = 0.0
    benchmarks: list[Benchmark] = Field(default_factory=list)
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Method, form, objective, policy and training, as a recipe writes them."""

    @property
    def exact(self) -> bool:
        """Whether it trained as many entries as the budget says."""
        return self.entries == self.budget_entries

    @property
    def seconds(self) -> float:
        """Of choosing and training."""
        return self.choose.seconds + self.train.seconds

    @property
    def peak_memory_bytes(self) -> int:
        return max(self.choose.peak_memory_bytes, self.train.peak_memory_bytes)


Kind = TypeVar("Kind", bound=Piece)


class Store:
    """The folder of an experiment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def facts(self) -> Path:
        """The file of what is known of the base."""
        return self.folder / "base.json"

    def forget_failures(self) -> None:
        """Remove every piece that failed, so that it is done again."""
        for where in ("choices", "trials", "cells"):
            for path in (self.folder / where).glob("*.json"):
                if json.loads(path.read_text(encoding="utf-8")).get("failed"):
                    path.unlink()

    def file(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}.json"

    def room(self, kind: str, key: str) -> Path:
        """Return the folder of a piece of work."""
        return self.folder / kind / key

    def chosen(self, key: str) -> Path:
        """Return the file of the entries of a choice."""
        return self.room("choices", key) / CHOSEN

    def read(self, kind: type[Kind], where: str, key: str) -> Kind | None:
        """Return a finished piece, or None.

        Raises:
            UserError: the file was changed by hand.
        """
        path = self.file(where, key)
        try:
            return kind.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(
                f"cannot be read ({str(error).splitlines()[0]})", file=path, mend="delete it: it is done again"
            ) from None

    def write(self, where: str, key: str, piece: Written) -> None:
        write_atomically(self.file(where, key), piece.model_dump_json(indent=1))


def key_of(**what: Any) -> str:
    """Return the name of a piece of work that depends on all of this."""
    return fingerprint({"format": FORMAT, **what})


def training_key(training: TrainingRecipe) -> dict[str, Any]:
    """Return what of the training matters to its result; the precision is in the key of its choice, as it was resolved."""
    return training.model_dump(mode="json", exclude={"report_to", "learning_rate", "precision"})
