"""Which cells an experiment has, what each is made of, and how far each has come.

Knows: the order of the cells, the fingerprint of each piece, and the rule that the first seed tunes the learning rate of the others.
Does not know: how a piece is done; it reads what is there.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from selectune import recipe as recipes
from selectune.data import input_hashes
from selectune.experiment.budget import Facts, Fitted, entries_of, fit, fit_examples
from selectune.experiment.lines import MethodLine
from selectune.experiment.pools import PlantedPool
from selectune.experiment.protocol import ENDLESS, Protocol
from selectune.experiment.store import Cell, Choice, Store, Trial, Within, key_of, training_key
from selectune.recipe import DataRecipe, Recipe, TrainingRecipe

ENTRIES, RESOURCES = "entries", "resources"


@dataclass(frozen=True, eq=False)
class Slot:
    """A cell that is wanted."""

    table: str
    line: MethodLine
    task: str
    budget: float
    seed: int

    @property
    def label(self) -> str:
        return f"{self.line.name}, {self.task}, {self.budget:g}, seed {self.seed}"


@dataclass(frozen=True)
class Missing:
    """The next piece of work of a cell."""

    where: str
    """``choices``, ``trials`` or ``cells``."""
    key: str
    recipe: Recipe
    choice_key: str
    trial: Trial | None = None
    trial_key: str = ""


class Plan:
    """All cells of an experiment over what is already done."""

    def __init__(self, protocol: Protocol, facts: Facts, store: Store) -> None:
        self.protocol, self.facts, self.store = protocol, facts, store

    @cached_property
    def data_keys(self) -> dict[str, str]:
        """The fingerprint of each task's records: what is in the files, and what is made of it."""
        keys = {}
        for name, task in self.protocol.tasks.items():
            data = self.data(name)
            sizes = [task.train_records, task.dev_records, task.test_records]
            files = list(input_hashes(data).values())
            pool = self.pool(name)
            extra = {} if pool is None else {"pool": task.pool, "pool_files": [list(input_hashes(source.data()).values())
                                                                               for source in (*pool.sources, *pool.off_domain)]}  # fmt: skip
            keys[name] = key_of(
                data=data.model_dump(exclude={"train", "test"}), sizes=sizes, files=files, held=data.test is None, **extra
            )
        return keys

    def pool(self, name: str) -> PlantedPool | None:
        """Return the pool that a task's methods choose from, where it has one."""
        return self.protocol.tasks[name].pool_under(self.protocol.data_root)

    def data(self, name: str) -> DataRecipe:
        """Return the data section of a task's recipes."""
        return self.protocol.tasks[name].data(self.protocol.data_root, self.protocol.training.max_length)

    def measured_key(self, name: str) -> str:
        """Return the fingerprint of the base's measurement on a task."""
        task = self.protocol.tasks[name]
        return key_of(base=self.facts.fingerprint, data=self.data_keys[name], metrics=task.metrics, answer=task.max_new_tokens,
                      bfloat16=self.facts.bfloat16)  # fmt: skip

    @cached_property
    def lines(self) -> list[MethodLine]:
        return self.protocol.lines()

    def slots(self, only: str | None = None, task: str | None = None) -> Iterator[Slot]:
        """Yield the cells that are wanted, in the order in which they are run: seed by seed, so that a table is whole early."""
        for seed in dict.fromkeys(seed for line in self.lines for seed in self.protocol.seeds_of(line)):
            for budget in self.protocol.budgets:
                for table in (ENTRIES, RESOURCES) if self.protocol.tables.resources_at(budget, seed) else (ENTRIES,):
                    for name in self.protocol.tasks:
                        for line in self.lines:
                            if only in (None, line.name) and task in (None, name) and seed in self.protocol.seeds_of(line):
                                yield Slot(table, line, name, budget, seed)

    def fitted(self, slot: Slot) -> Fitted:
        if self.protocol.axis == "examples":
            return fit_examples(slot.line, slot.budget)
        return fit(slot.line, entries_of(slot.budget, self.facts), self.facts)

    def entries(self, slot: Slot) -> int:
        """Return the budget in entries; 0 where it is of tokens."""
        return 0 if self.protocol.axis == "examples" else entries_of(slot.budget, self.facts)

    def choice_key(self, slot: Slot) -> str:
        fitted = self.fitted(slot)
        return key_of(base=self.facts.fingerprint, data=self.data_keys[slot.task], examples=fitted.examples, parameters=fitted.parameters,
                      form=fitted.form, entries=fitted.entries, knob=fitted.knob, seed=slot.seed, bfloat16=self.facts.bfloat16)  # fmt: skip

    def together(self, slot: Slot) -> dict[str, Slot]:
        """Return the cells, by the keys of their choices, whose weights are chosen in one process with those of a cell: other budgets of
        the same method, task and seed, which measure the same scores. The cell itself is the first."""
        found = {self.choice_key(slot): slot}
        for budget in self.protocol.budgets if self.protocol.axis == "parameters" else ():
            other = replace(slot, budget=budget)
            key = self.choice_key(other)
            if not self.store.file("choices", key).exists():
                found.setdefault(key, other)
        return found

    def signals_key(self, slot: Slot) -> str:
        """Return the fingerprint of all that signals of a task's records depend on, whatever the method that asks for them."""
        return key_of(base=self.facts.fingerprint, data=self.data_keys[slot.task], seed=slot.seed, bfloat16=self.facts.bfloat16)

    def recipe(self, slot: Slot, choice: Choice | None = None, rate: float | None = None, steps: int | None = None) -> Recipe:
        """Return the recipe of a piece of a cell; the method and form of a choice are those that the budget holds."""
        fitted = self.fitted(slot)
        training = self.training(slot, steps).model_copy(update={"learning_rate": rate})
        return recipes.parse({
            "name": "piece", "base": self.protocol.base, "trust_remote_code": self.protocol.trust_remote_code,
            "data": self.data(slot.task).model_dump(), "training": training.model_dump(), "seed": slot.seed,
            "examples": fitted.examples, "parameters": (choice or fitted).parameters, "form": (choice or fitted).form,
            "objective": fitted.objective, "policy": fitted.policy, "finish": fitted.finish,
        })  # fmt: skip

    def training(self, slot: Slot, steps: int | None = None) -> TrainingRecipe:
        """Return how a cell trains; ``steps`` wins over passes and steps of the protocol."""
        training = self.protocol.training_of(slot.line)
        return training if steps is None else training.model_copy(update={"max_steps": steps, "epochs": ENDLESS})

    def trial_key(self, slot: Slot, choice: Choice, rate: float, steps: int | None = None) -> str:
        fitted = self.fitted(slot)
        finish = {} if fitted.finish["method"] == "none" else {"finish": fitted.finish}
        return key_of(choice=self.choice_key(slot), form=choice.form, objective=fitted.objective, policy=fitted.policy,
                      training=training_key(self.training(slot, steps)), rate=rate, **finish)  # fmt: skip

    def trials(self, slot: Slot, choice: Choice, so_far: bool = False) -> dict[float, tuple[str, Trial | None]] | str:
        """Return the trials of a cell by learning rate, each with its key and what is known of it; or why there can be none."""
        rates, steps = self.protocol.rates(slot.line), None
        if slot.table == RESOURCES:
            within = self.steps_within(slot)
            if isinstance(within, str):
                return within
            rates, steps = [within[0]], within[1]
        elif slot.seed != self.protocol.seeds[0]:
            first = self.best(Slot(ENTRIES, slot.line, slot.task, slot.budget, self.protocol.seeds[0]), so_far)
            if isinstance(first, str):
                return f"no learning rate: the first seed: {first}"
            rates = [first[1].learning_rate]
        found = {rate: self._trial(slot, choice, rate, steps) for rate in rates}
        for _ in range(self.protocol.widen):
            further = _beyond({rate: trial for rate, (_, trial) in found.items()})
            if further is not None:
                found[further] = self._trial(slot, choice, further, steps)
        return found

    def _trial(self, slot: Slot, choice: Choice, rate: float, steps: int | None) -> tuple[str, Trial | None]:
        key = self.trial_key(slot, choice, rate, steps)
        return key, self.store.read(Trial, "trials", key)

    def best(self, slot: Slot, so_far: bool = False) -> tuple[str, Trial] | str:
        """Return the trial of the lowest development loss and its key, or why there is none (yet); ``so_far``: of those that there are, where
        more are wanted."""
        choice = self.store.read(Choice, "choices", self.choice_key(slot))
        if choice is None:
            return NOT_RUN
        if choice.failed:
            return choice.failed
        trials = self.trials(slot, choice, so_far)
        if isinstance(trials, str):
            return trials
        there = [trial is not None for _, trial in trials.values()]
        if not (any(there) if so_far else all(there)):
            return NOT_RUN
        good = [
            (trial.dev_loss, key, trial) for key, trial in trials.values() if trial is not None and trial.dev_loss is not None
        ]
        if not good:
            return next(trial.failed or "" for _, trial in trials.values() if trial is not None)
        return min(good, key=lambda one: one[0])[1:]

    def steps_within(self, slot: Slot) -> tuple[float, int] | str:
        """Return the learning rate and the number of steps with which choosing and training take the seconds of the table, from what the
        same cell took at equal steps; or why there are none."""
        limits = self.protocol.tables.resources
        assert limits is not None
        beside = Slot(ENTRIES, slot.line, slot.task, slot.budget, slot.seed)
        found, choice = self.best(beside), self.store.read(Choice, "choices", self.choice_key(beside))
        if isinstance(found, str) or choice is None:
            return found if isinstance(found, str) else NOT_RUN
        trial, known = found[1], self.store.read(Within, "within", self.within_key(slot))
        if known is not None and known.learning_rate == trial.learning_rate:
            return known.learning_rate, known.steps
        seconds = limits.seconds or self._seconds_of(limits.like, slot)
        if isinstance(seconds, str):
            return seconds
        memory = max(choice.cost.peak_memory_bytes, trial.cost.peak_memory_bytes) / 2**30
        if limits.memory_gib is not None and memory > limits.memory_gib:
            return f"needs {memory:.1f} GiB, more than the {limits.memory_gib:g} of the table"
        beginning = choice.cost.seconds + trial.cost.seconds - trial.steps * trial.step_seconds
        steps = int((seconds - beginning) / trial.step_seconds + ROUNDING) if trial.step_seconds else 0
        return (
            (trial.learning_rate, steps) if steps > 0 else f"choosing and starting take {beginning:.0f} of {seconds:.0f} seconds"
        )

    def within_key(self, slot: Slot) -> str:
        """Return the fingerprint of what says how many seconds a cell has, whatever the clock; a cell that was trained for them keeps its
        steps, however long the same work takes on another machine."""
        limits = self.protocol.tables.resources
        assert limits is not None
        like = None if limits.seconds else self._like(limits.like, slot)
        named = {} if like is None else {"like": self.choice_key(like), "training": training_key(self.training(like))}
        return key_of(choice=self.choice_key(slot), seconds=limits.seconds, memory_gib=limits.memory_gib, **named)

    def _like(self, name: str, slot: Slot) -> Slot:
        """Return the cell at equal steps whose seconds another one has: of the same seed where the line has it."""
        line = next(line for line in self.lines if line.name == name)
        seed = slot.seed if slot.seed in self.protocol.seeds_of(line) else self.protocol.seeds[0]
        return Slot(ENTRIES, line, slot.task, slot.budget, seed)

    def _seconds_of(self, name: str, slot: Slot) -> float | str:
        """Return what a line took at equal steps beside a cell."""
        beside = self._like(name, slot)
        found, choice = self.best(beside), self.store.read(Choice, "choices", self.choice_key(beside))
        if isinstance(found, str) or choice is None:
            return f"{name}, whose seconds are those of the table: {found}"
        return choice.cost.seconds + found[1].cost.seconds

    def cell_key(self, slot: Slot, trial_key: str) -> str:
        task = self.protocol.tasks[slot.task]
        return key_of(trial=trial_key, metrics=task.metrics, answer=task.max_new_tokens)

    def next(self, slot: Slot) -> Missing | None:
        """Return the next piece of work of a cell; None when it is finished, has failed, or waits for another."""
        choice_key = self.choice_key(slot)
        choice = self.store.read(Choice, "choices", choice_key)
        if choice is None:
            return Missing("choices", choice_key, self.recipe(slot), choice_key)
        if choice.failed:
            return None
        trials = self.trials(slot, choice)
        if isinstance(trials, str):
            return None
        steps = None
        if slot.table == RESOURCES:
            found = self.steps_within(slot)
            steps = None if isinstance(found, str) else found[1]
        for rate, (key, trial) in trials.items():
            if trial is None and not self.store.chosen(choice_key).exists():  # the choice was taken up from a record
                return Missing("choices", choice_key, self.recipe(slot), choice_key)
            if trial is None:
                return Missing("trials", key, self.recipe(slot, choice, rate, steps), choice_key)
        best = self.best(slot)
        if isinstance(best, str):
            return None
        key, trial = best
        cell = self.cell_key(slot, key)
        if self.store.read(Cell, "cells", cell) is not None:
            return None
        return Missing("cells", cell, self.recipe(slot, choice, trial.learning_rate, steps), choice_key, trial, key)

    def unmeasured(self, slot: Slot, missing: Missing) -> Cell:
        """Return a cell that is trained and not yet measured."""
        choice, trial, fitted = self.store.read(Choice, "choices", missing.choice_key), missing.trial, self.fitted(slot)
        assert choice is not None and trial is not None
        training = missing.recipe.training.model_dump(mode="json", exclude_defaults=True)
        methods = {"examples": fitted.examples, "parameters": choice.parameters, "form": choice.form, "objective": fitted.objective,
                   "policy": fitted.policy, "finish": fitted.finish}  # fmt: skip
        return self.described(slot, Cell(
            table=slot.table, method=slot.line.name, task=slot.task, budget=slot.budget, seed=slot.seed, entries=trial.entries,
            learning_rate=trial.learning_rate, steps=trial.steps, choose=choice.cost, train=trial.cost, step_seconds=trial.step_seconds,
            recipe={**methods, "training": training},
        ))  # fmt: skip

    def pieces(self, slot: Slot) -> dict[str, int]:
        """Return how many pieces of each kind a cell still needs, as far as can be told ahead."""
        first = slot.table == ENTRIES and slot.seed == self.protocol.seeds[0]
        rates = len(self.protocol.rates(slot.line)) if first else 1
        choice = self.store.read(Choice, "choices", self.choice_key(slot))
        found = self.trials(slot, choice) if choice is not None and not choice.failed else {}
        known = 0 if isinstance(found, str) else sum(trial is not None for _, trial in found.values())
        rates = max(rates, len(found)) if first and not isinstance(found, str) else rates
        best = self.best(slot)
        measured = not isinstance(best, str) and self.store.file("cells", self.cell_key(slot, best[0])).exists()
        return {"choices": int(choice is None), "trials": rates - known, "cells": int(not measured)}

    def tidy(self, slot: Slot) -> None:
        """Remove the specialists of a cell that is measured."""
        choice, best = self.store.read(Choice, "choices", self.choice_key(slot)), self.best(slot)
        if isinstance(best, str) or choice is None or not self.store.file("cells", self.cell_key(slot, best[0])).exists():
            return
        trials = self.trials(slot, choice)
        for key, _ in trials.values() if not isinstance(trials, str) else ():
            shutil.rmtree(self.store.room("trials", key), ignore_errors=True)

    def cell(self, slot: Slot) -> Cell:
        """Return a cell as far as it has come; ``failed`` says why it is not there, :data:`NOT_RUN` where it was not run."""
        empty = Cell(table=slot.table, method=slot.line.name, task=slot.task, budget=slot.budget, seed=slot.seed,
                     budget_entries=self.entries(slot))  # fmt: skip
        key, found = self.done_key(slot), self.best(slot)
        measured = self.store.read(Cell, "cells", key) if key else None
        if measured is None:
            return empty.model_copy(update={"failed": found if isinstance(found, str) else NOT_RUN})
        return self.described(slot, measured)

    def done_key(self, slot: Slot) -> str | None:
        """Return the fingerprint of a cell that is measured, at the best learning rate that is; None where there is none."""
        choice = self.store.read(Choice, "choices", self.choice_key(slot))
        trials = "" if choice is None or choice.failed else self.trials(slot, choice, so_far=True)
        if choice is None or isinstance(trials, str):
            return None
        done = [
            (trial.dev_loss, self.cell_key(slot, key))
            for key, trial in trials.values()
            if trial is not None and trial.dev_loss is not None
        ]
        return next((key for _, key in sorted(done) if self.store.file("cells", key).exists()), None)

    def described(self, slot: Slot, cell: Cell) -> Cell:
        """Return a measured cell under the name, budget and learning rates of a slot; cells that are the same work share one file."""
        choice = self.store.read(Choice, "choices", self.choice_key(slot))
        assert choice is not None
        trials = self.trials(slot, choice, so_far=True)
        assert not isinstance(trials, str)
        grid: dict[str, float | str] = {}
        for rate, (_, trial) in trials.items():
            if trial is not None:
                grid[f"{rate:g}"] = trial.dev_loss if trial.dev_loss is not None else trial.failed or ""
        return cell.model_copy(update={
            "table": slot.table, "method": slot.line.name, "task": slot.task, "budget": slot.budget, "seed": slot.seed, "grid": grid,
            "budget_entries": self.entries(slot), "records": choice.records, "tokens": choice.tokens, "kept": choice.kept,
        })  # fmt: skip


def _beyond(trials: dict[float, Trial | None]) -> float | None:
    """Return the learning rate beyond the edge of a grid at which the lowest development loss is; None where it is inside, or not yet known."""
    losses = {rate: math.inf if trial.dev_loss is None else trial.dev_loss for rate, trial in trials.items() if trial is not None}
    if len(losses) < max(2, len(trials)):
        return None
    rates = sorted(losses)
    best = min(rates, key=lambda rate: losses[rate])
    if losses[best] == math.inf or best not in (rates[0], rates[-1]):
        return None
    beside = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / beside:.6g}")


NOT_RUN = "not run"
ROUNDING = 1e-6
"""Of a step: what floating point takes from a whole number of them."""
