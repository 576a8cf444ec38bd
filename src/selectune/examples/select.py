"""From files to a file: the records of a pool that are worth training on.

Knows: how a pool is read, chosen from and written. Does not know: any method.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selectune import catalogue
from selectune.errors import UserError
from selectune.run import write_atomically


@dataclass
class Selected:
    """What was chosen."""

    pool: int
    chosen: int
    tokens: int
    """Of the chosen responses."""
    notes: list[str]
    records: list[Any]


@dataclass
class Questions:
    """What a choice would ask a model."""

    calls: int
    read: int
    """Tokens of the prompts, about."""
    written: int
    """Tokens of their answers, at most."""
    cost: float | None
    """By the method's prices; none where it has none."""


def choose_examples(
    data: str | list[str],
    method: str | dict[str, Any],
    *,
    target: str | list[str] | None = None,
    out: str | Path | None = None,
    scores: str | Path | None = None,
    base: str = "smollm2-135m-instruct",
    folder: str | Path | None = None,
    columns: dict[str, str] | None = None,
    seed: int = 0,
    engine: str = "local",
    quiet: bool = False,
    **settings: Any,
) -> Selected:
    """Choose records from a pool.

    Args:
        data: a file, folder, glob or hub id. method: as in a recipe; ``settings`` are more of its hyper-parameters, such as ``fraction=0.1``.
        target: records of the target. out: JSON lines for the chosen records, as chat records where they are conversations.
        scores: a parquet file for every record's signals. base: measures. folder: keeps what is measured.
        engine: where signals are measured: ``local``, or ``ray`` for the machines of a Ray cluster (``pip install 'selectune[ray]'``).

    Raises:
        UserError: a mistake in the input, a budget larger than the pool, a signal that cannot be measured.
    """
    from selectune.examples.factors.store import write_scores, written

    if engine not in ("local", "ray"):
        raise UserError(f"unknown engine '{engine}'", field="engine", expected="local or ray")
    written_to = [Path(place) for place in (out, scores) if place is not None]
    for place in written_to:
        if not place.absolute().parent.is_dir():
            raise UserError("its folder does not exist", file=place, mend="make it, or name another file")
        if place.is_dir():
            raise UserError("is a folder", file=place, mend="name a file")
        if not os.access(place.absolute().parent, os.W_OK):
            raise UserError("its folder cannot be written", file=place, mend="name another file")
    made, pool = _method_and_pool(data, method, target, base, folder, columns, seed, quiet, settings)
    read = {Path(source).resolve() for source in {record.source for record in [*pool.records, *pool.target]}}
    for place in written_to:
        if place.resolve() in read:
            raise UserError("is read, and would be overwritten", file=place, mend="name another file, with --out or --scores")
    pool.engine = engine
    choice = made.select(pool)
    kept = list(choice.as_they_train(pool.records).values())
    if choice.weights is not None:
        pool.notes.append(
            "the records' weights act in a run alone (`selectune specialize --examples`); a file of records holds none"
        )
    if out is not None:
        with written(out):
            write_atomically(Path(out), "".join(json.dumps(_as_chat(record), ensure_ascii=False) + "\n" for record in kept))
    if scores is not None:
        with written(scores):
            write_scores(Path(scores), pool, choice.signals, list(choice.as_they_train(pool.records)), choice.reasons)
    return Selected(len(pool), len(kept), int(pool.of(kept).tokens.sum()), pool.notes, kept)


def count_questions(
    data: str | list[str],
    method: str | dict[str, Any],
    *,
    target: str | list[str] | None = None,
    base: str = "smollm2-135m-instruct",
    folder: str | Path | None = None,
    columns: dict[str, str] | None = None,
    seed: int = 0,
    quiet: bool = False,
    **settings: Any,
) -> Questions:
    """Return what :func:`choose_examples` would ask a model that it has not asked yet; no model answers and nothing is chosen.

    Answers are empty, so questions that follow from answers are not counted. What the base measures is measured.

    Raises:
        UserError: as choosing would.
    """
    from selectune.inference.remembering import Rehearsal

    made, pool = _method_and_pool(data, method, target, base, folder, columns, seed, quiet, settings)
    pool.rehearsal = counted = Rehearsal()
    made.select(pool)
    read, written = (getattr(made, f"price_{way}", 0.0) * getattr(counted, way) / 1e6 for way in ("read", "written"))
    return Questions(counted.calls, counted.read, counted.written, read + written or None)


def _method_and_pool(
    data: Any, method: Any, target: Any, base: str, folder: Any, columns: Any, seed: int, quiet: bool, settings: dict[str, Any]
) -> tuple[Any, Any]:
    from selectune.data import Encoder
    from selectune.data.prepare import read_pool
    from selectune.examples.pool import Pool
    from selectune.models import bf16_is_fast, load_base

    if not 0 <= seed < 2**32:
        raise UserError(f"{seed} is no seed", field="seed", expected=f"0 to {2**32 - 1}")
    values = dict(method) if isinstance(method, dict) else catalogue.create("examples", method, "method").describe()
    made = catalogue.create("examples", values | settings, "method")
    records = read_pool(data, columns or {})
    wanted = read_pool(target, columns or {}, "target") if target is not None else []
    in_bfloat16 = bf16_is_fast()
    pool = Pool(
        records,
        lambda: load_base(base, dtype="auto" if in_bfloat16 else "float32"),
        lambda words: Encoder(words, 512),
        wanted,
        seed,
        bfloat16=in_bfloat16,
        quiet=quiet,
        folder=None if folder is None else Path(folder),
    )
    return made, pool


def _as_chat(record: Any) -> dict[str, Any]:
    """A record as others read it: OpenAI-style messages, or text; what a question with choices is made of stays."""
    if record.kind == "text":
        return {"text": record.text}
    shown: dict[str, Any] = {"messages": [asdict(message) for message in record.messages]}
    if record.choices:
        shown |= {"choices": list(record.choices), "answer": record.answer}
    return shown
