"""What a run kept of its pool and what it left out, with the signals that decided, and a map of the pool.

Knows: ``scores.parquet``, ``examples.json`` and the records of a run, and which of them a person is shown. Does not know: how a signal was
measured or a record chosen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from markupsafe import Markup

from selectune.reporting import charts
from selectune.reporting.projection import Plane, project
from selectune.run import Run

Array = np.ndarray
MOST = 10_000
"""Points of a map."""
SHOWN = 12
"""Records that are written out on each side."""
_OTHERS = ("key", "source", "line", "chosen", "rank", "reason")
"""Columns of scores.parquet that are no signals."""


@dataclass(frozen=True)
class Shown:
    """A record that is written out."""

    question: str
    response: str
    place: str
    rank: int | None
    reason: str
    signals: list[str]


@dataclass(frozen=True)
class Signal:
    """A signal on both sides: its lower quartile, median and upper quartile."""

    name: str
    kept: list[str]
    dropped: list[str]


@dataclass(frozen=True)
class Examples:
    """A choice of records, ready to be shown."""

    method: Any
    pool: int
    chosen: int
    notes: list[str]
    signals: list[Signal]
    sources: list[tuple[str, int, int]]
    """File, records of the pool, records kept."""
    kept: list[Shown]
    dropped: list[Shown]
    dropped_by: str
    """How the dropped ones that are shown were found, in words."""
    map: Markup
    data: Markup
    """What the map says of each point, as JSON."""
    plane: Plane
    drawn: int


def examples_of(run: Run) -> Examples | None:
    """Read a run's choice of records; None where every record trains, or the choice was not made yet."""
    if not run.has("scores.parquet") or not run.has("examples.json"):
        return None
    import pandas as pd

    from selectune.data import records_from_file

    table = pd.read_parquet(run.path("scores.parquet"))
    records = records_from_file(run.path("data", "train.jsonl"))
    trained = records_from_file(run.records("train"))
    told = json.loads(run.path("examples.json").read_text(encoding="utf-8"))
    names = [name for name in table.columns if name not in _OTHERS and pd.api.types.is_numeric_dtype(table[name])]
    signals = {name: table[name].to_numpy(dtype=np.float64) for name in names}
    chosen, rank = table["chosen"].to_numpy(dtype=bool), table["rank"].to_numpy()
    if len(trained) == chosen.sum():  # as they train, where a method changed them
        for place, record in zip(np.flatnonzero(chosen).tolist(), trained, strict=True):
            records[place] = record
    reasons = table["reason"].tolist() if "reason" in table else [""] * len(table)

    def shown(place: int) -> Shown:
        record = records[place]
        return Shown(_cut(record.question, 400), _cut(record.response, 600), _place(record), int(rank[place]) + 1 if chosen[place] else None,
                     reasons[place] or "", [_number(values[place]) for values in signals.values()])  # fmt: skip

    by_content = np.argsort(table["key"].to_numpy().astype(str), kind="stable")
    drawn = np.sort(by_content[:MOST])
    lengths = np.array(
        [[len(records[place].question), len(records[place].response)] for place in drawn], dtype=np.float64
    ).reshape(-1, 2)
    plane = project([table["key"][place] for place in drawn], {name: values[drawn] for name, values in signals.items()}, lengths,
                    run.path("examples", "signals"))  # fmt: skip
    places = _fitted(plane.places)
    groups = {"left out": places[~chosen[drawn]], "kept": places[chosen[drawn]]}
    first_kept = [
        int(place) for place in np.argsort(np.where(chosen, rank, len(rank)), kind="stable")[: min(SHOWN, int(chosen.sum()))]
    ]
    left_out, how = _left_out(by_content[~chosen[by_content]], signals)
    sources: dict[str, list[int]] = {}
    for source, is_kept in zip(table["source"], chosen, strict=True):
        counts = sources.setdefault(PurePath(source).name or "unnamed", [0, 0])
        counts[0] += 1
        counts[1] += bool(is_kept)
    return Examples(
        method=told["method"], pool=len(table), chosen=int(chosen.sum()), notes=told.get("notes", []),
        signals=[Signal(name, _quartiles(values[chosen]), _quartiles(values[~chosen])) for name, values in signals.items()],
        sources=[(name, counts[0], counts[1]) for name, counts in sorted(sources.items(), key=lambda item: -item[1][0])],
        kept=[shown(place) for place in first_kept], dropped=[shown(place) for place in left_out], dropped_by=how,
        map=charts.cloud({name: each.tolist() for name, each in groups.items()}, "Map of the pool",
                         f"{len(groups['kept']):,} records kept and {len(groups['left out']):,} left out, by {plane.of}"),
        data=_data(drawn, places, chosen, records, signals, reasons), plane=plane, drawn=len(drawn),
    )  # fmt: skip


def _left_out(places: Array, signals: dict[str, Array]) -> tuple[list[int], str]:
    """Return some records that were left out: those at both ends of the first signal that enough of them have, or the first by content."""
    for name, values in signals.items():
        known = places[np.isfinite(values[places])]
        if len(known) > SHOWN:
            ordered = known[np.argsort(values[known], kind="stable")].tolist()
            return [*ordered[::-1][: SHOWN // 2], *ordered[: SHOWN // 2][::-1]], f"the highest and the lowest by {name}"
    return places[:SHOWN].tolist(), "the first by content"


def _fitted(places: Array) -> Array:
    """Return coordinates from 0 to 1, outliers (two in a thousand on each side) at the edge."""
    if not len(places):
        return places
    low, high = np.quantile(places, 0.002, axis=0), np.quantile(places, 0.998, axis=0)
    return np.clip((places - low) / np.where(high > low, high - low, 1.0), 0, 1)


def _data(
    drawn: Array, places: Array, chosen: Array, records: Sequence[Any], signals: dict[str, Array], reasons: list[str]
) -> Markup:
    """Return what the map knows of each point, as JSON that may stand in a page: place on the picture, kept, texts, where, signals."""
    points = []
    for place, at in zip(drawn.tolist(), places, strict=True):
        record, values = records[place], [_number(column[place]) for column in signals.values()]
        where = [round(value, 1) for value in charts.on_cloud(*at)]
        texts = [_cut(record.question, 110), _cut(record.response, 110), _place(record)]
        points.append([*where, int(chosen[place]), *texts, values, reasons[place] or ""])
    text = json.dumps({"signals": list(signals), "points": points}, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _quartiles(values: Array) -> list[str]:
    known = values[np.isfinite(values)]
    return [_number(value) for value in np.quantile(known, (0.25, 0.5, 0.75))] if len(known) else []


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "\u2212") if math.isfinite(value) else "–"


def _cut(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def _place(record: Any) -> str:
    return f"{PurePath(record.source).name}:{record.line}"
