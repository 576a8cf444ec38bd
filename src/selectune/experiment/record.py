"""The JSON beside an experiment's page: every cell in few words, and how an experiment goes on from it where its folder is not there.

Knows: how a cell is written and read again, and that only cells whose fingerprint is that of the present plan are taken up: another
protocol, base, data or version does them anew. Does not know: what is on the page, or how a cell is run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selectune import catalogue
from selectune.errors import UserError
from selectune.experiment.budget import Facts
from selectune.experiment.jobs import PLANTED
from selectune.experiment.plan import RESOURCES, Plan, Slot
from selectune.experiment.planting import Account
from selectune.experiment.results import Sheet
from selectune.experiment.store import Cell, Choice, Measured, Trial, Within
from selectune.run import Benchmark, Item, write_atomically

_AXES = {key: axis for axis, key in catalogue.KEYS.items()}
"""Key of a cell's recipe -> axis of the catalogue."""
DIGITS = 5
"""Of an item's value."""


def write_record(plan: Plan, found: Sequence[Sheet], claims: list[dict[str, Any]], path: Path) -> None:
    """Write all cells, with the values of every item that an interval is made from."""
    machine = plan.store.folder / "environment.json"
    slots = _slots(plan)
    values = {
        "protocol": plan.protocol.model_dump(mode="json", exclude_defaults=True, exclude={"data_root", "output"}),
        "facts": plan.facts.model_dump(mode="json"),
        "machine": json.loads(machine.read_text(encoding="utf-8")) if machine.exists() else _read(path).get("machine"), "claims": claims,
        "pools": pools_of(plan, path), "measured": {sheet.task: plan.measured_key(sheet.task) for sheet in found},
        "base": {sheet.task: [one.model_dump(mode="json", exclude_defaults=True) for one in sheet.base] for sheet in found},
        "cells": [_keys(plan, slots[_place(cell)]) | _short(cell, sheet.base)
                  for sheet in found for row in sheet.rows for cell in row.all],
    }  # fmt: skip
    write_atomically(path, _lines_of(values))


def take_up(plan: Plan, path: Path) -> int:
    """Write the pieces of all cells of a record that the folder of the experiment lacks, and return how many cells those were.

    Raises:
        UserError: the file is no record.
    """
    record = _read(path)
    slots = _slots(plan)
    try:
        base = {task: [Benchmark.model_validate(one) for one in measured] for task, measured in record.get("base", {}).items()}
        for task, key in record.get("measured", {}).items():
            if task in plan.protocol.tasks and base[task] and key == plan.measured_key(task):
                _put(plan, "measured", key, Measured(benchmarks=base[task]))
        return sum(
            _take_up_cell(plan, slot, cell, base[slot.task])
            for cell in record.get("cells", [])
            if cell.get("key") and (slot := slots.get(_place(Cell.model_construct(**cell)))) is not None
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_a_record(path, error) from None


def pools_of(plan: Plan, path: Path) -> dict[str, dict[str, int]]:
    """Return how many records of each kind the pool of each task has: as it was drawn, or as a record says."""
    found: dict[str, dict[str, int]] = {}
    known = _read(path)
    for task, key in plan.data_keys.items():
        planted = plan.store.room("data", key) / PLANTED
        if planted.exists():
            found[task] = Account.model_validate_json(planted.read_bytes()).sizes()
        elif known.get("measured", {}).get(task) == plan.measured_key(task):
            found |= {task: known.get("pools", {}).get(task) or {}}
    return {task: sizes for task, sizes in found.items() if sizes}


def facts_of(path: Path | None) -> Facts | None:
    """Return what a record knows of the base; None where there is no record."""
    if path is None or not (record := _read(path)):
        return None
    try:
        return Facts.model_validate(record["facts"])
    except (KeyError, ValueError) as error:
        raise _not_a_record(path, error) from None


def _keys(plan: Plan, slot: Slot) -> dict[str, str | None]:
    """Return the fingerprints under which a cell is taken up: of its work and, where that follows from seconds, of what says how many."""
    done = plan.done_key(slot)
    return {"key": done or _failed_key(plan, slot)} | (
        {"within": plan.within_key(slot)} if done and slot.table == RESOURCES else {}
    )


def _failed_key(plan: Plan, slot: Slot) -> str | None:
    """Return the fingerprint of a choice that failed."""
    choice = plan.store.read(Choice, "choices", plan.choice_key(slot))
    return plan.choice_key(slot) if choice is not None and choice.failed else None


def _slots(plan: Plan) -> dict[tuple[Any, ...], Slot]:
    return {(slot.table, slot.line.name, slot.task, slot.budget, slot.seed): slot for slot in plan.slots()}


def _place(cell: Cell) -> tuple[Any, ...]:
    return cell.table, cell.method, cell.task, cell.budget, cell.seed


def _not_a_record(path: Path, error: Exception) -> UserError:
    said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return UserError(f"cannot be read as the cells of an experiment ({said})", file=path,
                     mend="delete it, or write the page elsewhere")  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise _not_a_record(path, error) from None
    if not isinstance(found, dict):
        raise _not_a_record(path, ValueError("no object"))
    return found


def _take_up_cell(plan: Plan, slot: Slot, short: dict[str, Any], base: Sequence[Benchmark]) -> bool:
    """Write the choice, the trials and the measurement of a cell, if they are still those that the plan wants."""
    key = short["key"]
    if short["failed"] and key == plan.choice_key(slot):
        _put(plan, "choices", key, Choice(failed=short["failed"]))
    if slot.table == RESOURCES and not short["failed"] and short.get("within") == plan.within_key(slot):
        _put(plan, "within", short["within"], Within(learning_rate=short["learning_rate"], steps=short["steps"]))
    if short["failed"] or plan.store.file("cells", key).exists():
        return False
    try:
        methods = {
            name: catalogue.create(axis, short["recipe"][name]).describe()
            for name, axis in _AXES.items()
            if name in short["recipe"]
        }
    except UserError:  # of another version
        return False
    cell = Cell.model_validate({name: value for name, value in short.items() if name not in ("key", "within")} | {
        "recipe": short["recipe"] | methods, "benchmarks": [_benchmark(one, base) for one in short["benchmarks"]]})  # fmt: skip
    choice = Choice(parameters=methods["parameters"], form=methods["form"], entries=cell.entries, records=cell.records,
                    tokens=cell.tokens, kept=cell.kept, cost=cell.choose)  # fmt: skip
    steps = cell.steps if slot.table == RESOURCES else None
    best = Trial(learning_rate=cell.learning_rate or 0.0, steps=cell.steps, entries=cell.entries, cost=cell.train,
                 step_seconds=cell.step_seconds or cell.train.seconds / max(cell.steps, 1))  # fmt: skip
    if plan.cell_key(slot, plan.trial_key(slot, choice, best.learning_rate, steps)) != key:
        return False
    _put(plan, "choices", plan.choice_key(slot), choice)
    exact = {f"{rate:g}": rate for rate in (*plan.protocol.rates(slot.line), best.learning_rate)}
    for said, loss in cell.grid.items():
        rate = exact.get(said, float(said))
        trial = best if rate == best.learning_rate else Trial(learning_rate=rate)
        told = {"failed": loss, "dev_loss": None} if isinstance(loss, str) else {"dev_loss": loss}
        _put(plan, "trials", plan.trial_key(slot, choice, rate, steps), trial.model_copy(update=told))
    _put(plan, "cells", key, cell)
    return True


def _put(plan: Plan, where: str, key: str, piece: Any) -> None:
    if not plan.store.file(where, key).exists():
        plan.store.write(where, key, piece)


def _short(cell: Cell, base: Sequence[Benchmark]) -> dict[str, Any]:
    """Return a cell whose methods say only what is not their default, and whose items are their values alone, in the order of the base's
    items of the same name; what no interval is made from is its score alone."""
    order = {one.name: [item.id for item in one.items] for one in base}
    measured = []
    for one in cell.benchmarks:
        short = one.model_dump(mode="json", exclude={"items"})
        if one.role == "target" or one.metric == "cross_entropy":
            values = {item.id: _rounded(item.value) for item in one.items}
            same = list(values) == order.get(one.name)
            short["values"] = list(values.values()) if same else values
        measured.append(short)
    recipe = {key: _named(_AXES[key], value) if key in _AXES else value for key, value in cell.recipe.items()}
    costs = {key: getattr(cell, key).model_dump(mode="json", exclude_defaults=True) for key in ("choose", "train")}
    return cell.model_dump(mode="json", exclude={"benchmarks"}) | costs | {"recipe": recipe, "benchmarks": measured}


def _rounded(value: float) -> float | int:
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short == int(short) else short


def _named(axis: str, described: dict[str, Any]) -> dict[str, Any]:
    """Return a method by its name and what differs from its defaults."""
    method = catalogue.create(axis, described)
    return {"method": method.name, **method.model_dump(mode="json", exclude_defaults=True)}


def _benchmark(short: dict[str, Any], base: Sequence[Benchmark]) -> dict[str, Any]:
    """Return a benchmark with its items again."""
    values = short.get("values", {})
    if isinstance(values, list):
        names = next([item.id for item in one.items] for one in base if one.name == short["name"])
        values = dict(zip(names, values, strict=True))
    items = [Item(id=name, value=value) for name, value in values.items()]
    return {key: value for key, value in short.items() if key != "values"} | {"items": short.get("items", items)}


def _lines_of(values: dict[str, Any]) -> str:
    """Return values as JSON without blanks, a line for each of a list and one for everything else."""

    def short(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    lines = []
    for key, value in values.items():
        each = [short(one) for one in value] if isinstance(value, list) else []
        lines.append(f"{short(key)}:" + ("[\n" + ",\n".join(each) + "\n]" if each else short(value)))
    return "{\n" + ",\n".join(lines) + "\n}\n"
