"""Signals of records, measured once and kept as they come.

Knows: how a signal is measured batch after batch with progress, here or on a cluster, how what was measured survives being killed, and how equal
records, and choices at the same time, share one measurement. Does not know: what a signal means.

Kept in the pool's folder: ``signals/<signal>/part-<number>-<chance>.parquet`` with the columns ``key`` (hash of the record's content) and ``value``,
and with what measuring it cost; the signal's folder is another one for another base, or the same that reads records otherwise. What is known is one
sorted array of keys and one of values: a million records are no million objects.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from selectune.data.records import Record
from selectune.errors import UserError
from selectune.examples.factors.signals import Signal
from selectune.examples.pool import Pool
from selectune.progress import watched

Array = np.ndarray
BATCH = 64
"""Records that are measured together, where a signal does not say."""
COST = b"cost"
"""Under which a part's metadata say what measuring it cost, and which choice spent it."""
SECONDS = 5.0
"""Of measuring, after which it is written (a batch that takes longer is written at once): what a kill may lose."""


def measure(pool: Pool, signal: Signal, records: Sequence[Record] | None = None) -> Array:
    """Return a signal of the pool's records (or of others), ``(records,)`` or ``(records, width)``, measuring only what is not known yet.

    Not-a-number where a record has no value (no response, for instance).
    """
    asked = pool.records if records is None else records
    named = pool.keys if records is None else [record.key for record in records]
    if not named:
        return np.empty(0)
    keys, first, back = np.unique(np.array(named, dtype="S64"), return_index=True, return_inverse=True)
    place = pool.library or pool.folder
    folder = None if place is None else place / "signals" / _folder_name(pool, signal)
    with _in_turn(pool, folder):
        values = _completed(pool, signal, folder, keys, [asked[place] for place in first.tolist()])
    return values[back]


def _completed(pool: Pool, signal: Signal, folder: Path | None, keys: Array, records: list[Record]) -> Array:
    """Return the values of some keys, ``(n,)`` bytes, sorted: those that are kept, and those that are measured now."""
    values, have = _known(folder, keys, signal, pool)
    # by content: what is measured together depends neither on the pool's order nor on what a kill left over
    size = signal.together or BATCH
    missing = [slice(start, start + size) for start in range(0, len(keys), size) if not have[start : start + size].all()]
    unwritten: list[slice] = []
    since, spent = time.monotonic(), _Spent(pool)
    measured = _measured(pool, signal, [records[batch] for batch in missing])
    try:
        for number, found in measured:
            if values is None:
                values = np.full((len(keys), *found.shape[1:]), np.nan, dtype=np.float64 if signal.width is None else np.float32)
            values[missing[number]] = found
            unwritten.append(missing[number])
            if folder is not None and time.monotonic() - since >= SECONDS:
                ready, unwritten = unwritten, []
                _write(folder, keys, values, ready, spent.since_last())
                since = time.monotonic()
    finally:  # also when it is stopped, or a record cannot be measured
        if folder is not None and values is not None and unwritten:
            _write(folder, keys, values, unwritten, spent.since_last())
    assert values is not None
    return values


@contextmanager
def _in_turn(pool: Pool, folder: Path | None) -> Iterator[None]:
    """Within, nobody else measures a signal of the library; waiting is no cost of a choice, which is charged what the other measured."""
    if pool.library is None or folder is None:
        yield
        return
    with written(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".lock").open("w")
    with file:
        begin = time.perf_counter()
        fcntl.flock(file, fcntl.LOCK_EX)
        pool.meter.count(seconds=begin - time.perf_counter())
        yield


class _Spent:
    """What measuring costs, from one part that is written to the next."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self._owner = pool, str(pool.folder)
        self._last = self._now()

    def _now(self) -> dict[str, float]:
        cost = self._pool.meter.cost
        return {
            "seconds": time.monotonic(),
            "forward": cost.forward_tokens,
            "backward": cost.backward_tokens,
            "flops": cost.flops,
        }

    def since_last(self) -> dict[str, Any]:
        """Return the cost since the last time, and whose it was."""
        before, self._last = self._last, self._now()
        return {name: value - before[name] for name, value in self._last.items()} | {"of": self._owner}


def _charge(pool: Pool, spent: dict[str, Any], share: float) -> None:
    """Count a share of what another choice spent on a part as this one's cost."""
    if spent and spent["of"] != str(pool.folder):
        forward, backward = round(spent["forward"] * share), round(spent["backward"] * share)
        pool.meter.count(forward=forward, backward=backward, flops=spent["flops"] * share, seconds=spent["seconds"] * share)


def _measured(pool: Pool, signal: Signal, batches: list[list[Record]]) -> Iterator[tuple[int, Array]]:
    """Give the number of each batch and its values, in whatever order they are ready."""
    if not batches:
        return
    found = _measured_here(pool, signal, batches)
    if pool.engine == "ray":
        from selectune.examples.factors.cluster import measured

        found = measured(pool, signal, batches, found)
    yield from watched(found, signal.shown, pool.quiet, len(batches))


def _measured_here(pool: Pool, signal: Signal, batches: list[list[Record]]) -> Iterator[tuple[int, Array]]:
    worker = pool.worker() if signal.needs_base else None
    for number, batch in enumerate(batches):
        yield number, signal.measure(worker, batch)


def _folder_name(pool: Pool, signal: Signal) -> str:
    settings = repr(sorted(signal.settings().items()))
    if signal.needs_base:
        base, reads = pool.base, pool.encoder
        settings += repr(
            (base.fingerprint, str(base.model.dtype), pool.bfloat16, reads.max_length, reads.long_records, reads.system)
        )
    return f"{re.sub(r'[^a-z0-9]+', '-', signal.shown.lower())}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"


def _known(folder: Path | None, keys: Array, signal: Signal, pool: Pool) -> tuple[Array | None, Array]:
    """Return the values of some keys as far as they are kept, not-a-number elsewhere, and which are; no values where none is.

    What others measured is charged to the pool's meter, each value once.

    Args:
        keys: ``(n,)`` bytes, sorted.

    Raises:
        UserError: a part is damaged.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    values, have = None, np.zeros(len(keys), dtype=bool)
    for part in sorted(folder.glob("part-*.parquet")) if folder is not None and folder.is_dir() else []:
        try:
            table = parquet.read_table(part).combine_chunks()
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"cannot be read ({error})", file=part, mend="remove it: what it holds is measured again") from None
        found = table["key"].to_numpy().astype("S64")
        column = table["value"].combine_chunks()
        numbers = (column.flatten() if signal.width is not None else column).to_numpy(zero_copy_only=False)
        numbers = numbers.reshape(len(found), *([-1] if signal.width is not None else []))
        if values is None:
            values = np.full((len(keys), *numbers.shape[1:]), np.nan, dtype=np.float64 if signal.width is None else np.float32)
        at = np.minimum(np.searchsorted(keys, found), len(keys) - 1)
        asked = keys[at] == found
        values[at[asked]], have[at[asked]] = numbers[asked], True
        if pool.library is not None:
            known = pool.charged.setdefault(part, np.zeros(len(found), dtype=bool))
            _charge(pool, json.loads((table.schema.metadata or {}).get(COST, b"{}")), float((asked & ~known).mean()))
            known |= asked
    return values, have


def _write(folder: Path, keys: Array, values: Array, batches: list[slice], spent: dict[str, Any]) -> None:
    """Add a part to what is kept, with what it cost."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    kept = np.concatenate([values[batch] for batch in batches])
    flat = arrow.array(kept.ravel())
    column = flat if kept.ndim == 1 else arrow.FixedSizeListArray.from_arrays(flat, kept.shape[1])
    table = arrow.table({"key": np.concatenate([keys[batch] for batch in batches]).astype(str), "value": column})
    table = table.replace_schema_metadata({COST: json.dumps(spent)})
    # two choices at once may write the same number
    path = folder / f"part-{len(list(folder.glob('part-*.parquet'))):06d}-{uuid4().hex[:12]}.parquet"
    with written(path):
        folder.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


@contextmanager
def written(path: str | Path) -> Iterator[None]:
    """Within, a file that cannot be written is a user's mistake, told in one line.

    Raises:
        UserError: it cannot (no permission, no space).
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror or error})", file=path,
                        mend="free space or name another place; what was measured before is kept where a folder was named") from None  # fmt: skip


def write_scores(
    path: Path, pool: Pool, signals: dict[str, Array], places: Sequence[int] | Array, reasons: dict[int, str] | None = None
) -> None:
    """Write ``scores.parquet``: each record's key, source, line, its signals, whether (and as which) it was chosen, and the method's reasons."""
    import pandas as pd

    rank = np.full(len(pool), -1, dtype=np.int64)
    rank[places] = np.arange(len(places))
    columns: dict[str, Any] = {
        "key": pool.keys,
        "source": [record.source for record in pool.records],
        "line": [record.line for record in pool.records],
        **{name: values for name, values in signals.items() if np.ndim(values) == 1},
        "chosen": rank >= 0,
        "rank": rank,
    }
    if reasons:
        columns["reason"] = [reasons.get(place, "") for place in range(len(pool))]
    beside = path.with_suffix(".new")
    pd.DataFrame(columns).to_parquet(beside, index=False)
    beside.replace(path)


def chosen_keys(path: Path) -> list[str]:
    """Return the keys of the records that were chosen, as they were in the pool, from ``scores.parquet``."""
    import pandas as pd

    table = pd.read_parquet(path, columns=["key", "chosen"])
    return [str(key) for key in table["key"][table["chosen"]]]
