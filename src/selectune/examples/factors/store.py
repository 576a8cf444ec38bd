"""Signals of records, measured once and kept as they come.

Knows: how a signal is measured batch after batch with progress, how what was measured survives being killed, and how equal records share one
measurement. Does not know: what a signal means.

Kept in the pool's folder: ``signals/<signal>/part-<number>.parquet`` with the columns ``key`` (hash of the record's content) and ``value``.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from selectune.data.records import Record
from selectune.errors import UserError
from selectune.examples.factors.signals import Signal, Worker
from selectune.examples.pool import Pool

Array = np.ndarray
BATCH = 64
"""Records that are measured together, and lost together when a run is killed."""


def measure(pool: Pool, signal: Signal, records: Sequence[Record] | None = None) -> Array:
    """Return a signal of the pool's records (or of others), ``(records,)`` or ``(records, width)``, measuring only what is not known yet.

    Not-a-number where a record has no value (no response, for instance).
    """
    asked = pool.records if records is None else records
    keys = pool.keys if records is None else [record.key for record in records]
    folder = None if pool.folder is None else pool.folder / "signals" / _folder_name(signal)
    known = _read(folder)
    each = dict(sorted(zip(keys, asked, strict=True), key=lambda pair: pair[0]))
    ordered = list(each)  # by content: what is measured together depends neither on the pool's order nor on what a kill left over
    batches = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    missing = [[each[key] for key in batch] for batch in batches if any(key not in known for key in batch)]
    if missing:
        for number, (batch, values) in enumerate(_measured(pool, signal, missing), _parts(folder)):
            found = dict(zip((record.key for record in batch), values, strict=True))
            known |= found
            if folder is not None:
                _write(folder / f"part-{number:06d}.parquet", found)
    if not keys:
        return np.empty(0)
    return np.stack([np.asarray(known[key], dtype=np.float64 if signal.width is None else np.float32) for key in keys])


def _measured(pool: Pool, signal: Signal, batches: list[list[Record]]) -> Iterator[tuple[list[Record], Array]]:
    worker = Worker(pool.base, pool.encoder, pool.bfloat16, pool.seed, pool.meter) if signal.needs_base else None
    shown = len(batches) > 1 and not pool.quiet
    for batch in track(batches, signal.shown, console=Console(file=sys.stderr), transient=True) if shown else batches:
        yield batch, signal.measure(worker, batch)


def _folder_name(signal: Signal) -> str:
    settings = repr(sorted(signal.settings().items()))
    return f"{re.sub(r'[^a-z0-9]+', '-', signal.shown.lower())}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"


def _parts(folder: Path | None) -> int:
    return 0 if folder is None or not folder.is_dir() else len(list(folder.glob("part-*.parquet")))


def _read(folder: Path | None) -> dict[str, Any]:
    import pyarrow.parquet as parquet

    known: dict[str, Any] = {}
    if folder is not None and folder.is_dir():
        for part in sorted(folder.glob("part-*.parquet")):
            table = parquet.read_table(part)
            known |= dict(zip(table["key"].to_pylist(), table["value"].to_numpy(zero_copy_only=False), strict=True))
    return known


def _write(path: Path, values: dict[str, Any]) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    table = arrow.table({"key": list(values), "value": [value.tolist() for value in values.values()]})
    beside = path.with_suffix(".new")
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, beside)
        beside.replace(path)


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


def write_scores(path: Path, pool: Pool, signals: dict[str, Array], places: Array, reasons: dict[int, str] | None = None) -> None:
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
