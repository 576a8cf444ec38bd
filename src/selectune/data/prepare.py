"""The data stage: sources in, clean splits out, with a count of everything that was dropped and why.

Knows: the order: read, find the shape, drop what is empty, drop duplicates, split by hash, check for contamination, limit.
Does not know: tokens, models, or how the evaluation sets were read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from selectune.data.contamination import ContaminationIndex
from selectune.data.duplicates import content, drop_exact, drop_near
from selectune.data.read import find_files, is_hub_id, read_rows
from selectune.data.records import Record
from selectune.data.shapes import Shape, find_shape, to_records
from selectune.errors import UserError
from selectune.progress import watched
from selectune.recipe import DataRecipe
from selectune.run import DataSummary, Dropped, hash_file


@dataclass(frozen=True)
class Prepared:
    """Clean records in three splits, and the account of how they came to be."""

    train: list[Record]
    dev: list[Record]
    test: list[Record]
    summary: DataSummary


def input_hashes(recipe: DataRecipe) -> dict[str, str]:
    """Return the sha256 of every input file, by path (of a hub id, its name)."""
    return {
        key: value
        for field in ("train", "test", "target")
        for key, value in hashes_of(getattr(recipe, field), f"data.{field}").items()
    }


def hashes_of(sources: str | list[str] | None, field: str) -> dict[str, str]:
    """Return the sha256 of every file of some sources, by path (of a hub id, its name).

    Raises:
        UserError: one is not there, or may not be read.
    """
    hashes = {}
    for source in [sources] if isinstance(sources, str) else sources or []:
        if is_hub_id(source):
            hashes[source] = "hub"
            continue
        for path in find_files(source, field):
            try:
                hashes[str(path)] = hash_file(path)
            except PermissionError:
                raise UserError("may not be read", file=path, mend="change its permissions") from None
    return hashes


def prepare(recipe: DataRecipe, evaluation_texts: dict[str, list[str]] | None = None, seed: int = 0) -> Prepared:
    """Prepare the records of a run.

    Args:
        recipe: the data section. evaluation_texts: name of an evaluation set -> texts, for the contamination check.

    Raises:
        UserError: see the modules that read; also when nothing is left to train on.
    """
    if recipe.train is None:
        raise UserError("no training data", field="data.train", expected="a file, folder, glob or hub id")
    account = _Account()
    records, shape = _load(recipe, recipe.train, "data.train", account)
    read = len(records) + sum(dropped.count for dropped in account.dropped)
    held: list[Record] = []
    if recipe.test is not None:
        held, _ = _load(recipe, recipe.test, "data.test", None)
        if not held:
            raise UserError("the test set holds no usable record", file=_name(recipe.test), field="data.test")
    if recipe.deduplicate != "off":
        records, dropped = drop_exact(records)
        account.drop("exact duplicate", dropped)
    if recipe.deduplicate == "near":
        records, dropped = drop_near(records)
        account.drop("near duplicate", dropped)
    test_share = 0.0 if recipe.test is not None else recipe.test_fraction
    splits = split(records, recipe.dev_fraction, test_share)
    test = held or splits["test"]
    train, dev = splits["train"], splits["dev"]
    texts = {**(evaluation_texts or {})}
    if test:
        texts["target"] = [record.question for record in test]
    found: dict[str, int] = {}
    if recipe.contamination != "off" and texts:
        index = ContaminationIndex(texts, train)
        marks = [index.overlaps(record) for record in watched(train, "checking for contamination", quiet=len(train) < 5000)]
        for names in marks:
            for name in names:
                found[name] = found.get(name, 0) + 1
        if recipe.contamination == "remove":
            account.drop("contamination", [record for record, names in zip(train, marks) if names])
            train = [record for record, names in zip(train, marks) if not names]
            dev = [record for record in dev if not index.overlaps(record)]
    if recipe.limit and len(train) > recipe.limit:
        chosen = {record.key for record in sorted(train, key=lambda record: record.key)[: recipe.limit]}
        account.drop("limit", [record for record in train if record.key not in chosen])
        share, train = recipe.limit / len(train), [record for record in train if record.key in chosen]
        kept = {record.key for record in sorted(dev, key=lambda record: record.key)[: math.ceil(share * len(dev))]}
        account.drop("limit", [record for record in dev if record.key not in kept])
        dev = [record for record in dev if record.key in kept]
    if not train:
        reasons = ", ".join(f"{item.count} {item.reason}" for item in account.dropped) or "all went into dev and test"
        raise UserError(f"nothing is left to train on ({reasons})", file=_name(recipe.train), field="data.train",
                        mend="give more records, or set data.contamination: report")  # fmt: skip
    hashes = input_hashes(recipe)
    summary = DataSummary(
        files=list(hashes),
        hashes=hashes,
        shape=shape.name,
        columns=shape.columns,
        read=read,
        dropped=account.dropped,
        splits={"train": len(train), "dev": len(dev), "test": len(test)},
        contamination={name: found.get(name, 0) for name in texts} if recipe.contamination != "off" else {},
        example=_show(train[0]),
        warnings=_warnings(train, dev, test),
    )
    return Prepared(train, dev, test, summary)


def read_target(recipe: DataRecipe) -> list[Record]:
    """Read the records that say what the target is like; none where the recipe names none.

    Raises:
        UserError: they cannot be read, or none has an answer.
    """
    if recipe.target is None:
        return []
    return _load(recipe, recipe.target, "data.target", None)[0]


def read_pool(sources: str | list[str], columns: dict[str, str], field: str = "data") -> list[Record]:
    """Read every record of some files, without splits or checks.

    Raises:
        UserError: they cannot be read, or none is usable.
    """
    return _load(DataRecipe(columns=columns), sources, field, _Account())[0]


def split(records: list[Record], dev: float, test: float) -> dict[str, list[Record]]:
    """Split by hash of the content: a record's split depends on nothing but itself.

    Records that ask the same question go the same way.
    """
    import hashlib

    parts: dict[str, list[Record]] = {"train": [], "dev": [], "test": []}
    for record in records:
        digest = hashlib.sha256(record.question.strip().lower().encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        parts["test" if place < test else "dev" if place < test + dev else "train"].append(record)
    return parts


def _load(recipe: DataRecipe, sources: str | list[str], field: str, account: _Account | None) -> tuple[list[Record], Shape]:
    rows = read_rows(sources, field)
    columns = {role: name for role, name in recipe.columns.items() if any(name in row.values for row in rows[:1])}
    shape = find_shape(rows, recipe.shape, recipe.columns if account is not None else columns)
    records = to_records(rows, shape, recipe.system, recipe.labels)
    filled: list[Record] = []
    empty: list[Record] = []
    for record in records:
        asked = record.kind == "text" or record.question.strip()
        (filled if record.response.strip() and asked else empty).append(record)
    if account is not None:
        account.drop("empty response", empty)
    if not filled:
        raise UserError("every response is empty", file=rows[0].file, line=rows[0].line,
                        field=list(shape.columns.values())[-1], mend="name the right column with data.columns")  # fmt: skip
    return filled, shape


class _Account:
    def __init__(self) -> None:
        self.dropped: list[Dropped] = []

    def drop(self, reason: Any, records: list[Record]) -> None:
        if records:
            examples = [f"{record.place}: {content(record)[:120]}" for record in records[:3]]
            self.dropped.append(Dropped(reason=reason, count=len(records), examples=examples))


def _warnings(train: list[Record], dev: list[Record], test: list[Record]) -> list[str]:
    notes = []
    if len(train) < 50:
        notes.append(f"only {len(train)} training records: expect little")
    if not dev:
        notes.append("no development records: the last checkpoint is taken instead of the best")
    if not test:
        notes.append("no test records: the gain cannot be measured")
    elif len(test) < 100:
        notes.append(f"only {len(test)} test records: intervals will be wide")
    return notes


def _show(record: Record) -> str:
    if record.kind == "text":
        return record.text[:600]
    return "\n".join(f"[{message.role}] {message.content[:400]}" for message in record.messages)


def _name(sources: str | list[str]) -> str:
    return sources if isinstance(sources, str) else sources[0]
