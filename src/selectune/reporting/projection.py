"""A pool on a plane: two coordinates for each record, near where records are alike.

Knows: principal components of vectors that a run measured, or of its signals and the records' lengths where it measured none. Does not know: how
anything is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Array = np.ndarray
PREFERRED = ("embedding-by-the-sentence-encoder", "embedding", "sketch")
"""Beginnings of the names of measured vectors, the best for a map first."""


@dataclass(frozen=True)
class Plane:
    """Where records lie."""

    places: Array
    """``(n, 2)`` float64, both axes on one scale, centred."""
    of: str
    """What was projected, in words."""
    share: float
    """Of the variance that the two axes hold, 0 to 1."""


def principal(values: Array) -> tuple[Array, float]:
    """Return ``(n, 2)`` coordinates along the two principal components of ``(n, d)`` values, and the share of the variance they hold.

    Signs are such that the largest loading of each component is positive, so equal values give the same picture.
    """
    centred = values.astype(np.float64) - values.mean(0)
    spread, axes = np.linalg.eigh(centred.T @ centred)
    axes, spread = axes[:, ::-1][:, :2], spread[::-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    places = centred @ axes
    if places.shape[1] < 2:
        places = np.column_stack([places, np.zeros(len(places))])
    total = float(spread.clip(min=0).sum())
    return places, float(spread[:2].clip(min=0).sum() / total) if total > 0 else 1.0


def project(keys: Sequence[str], signals: Mapping[str, Array], lengths: Array, measured: Path) -> Plane:
    """Place records on a plane.

    Args:
        keys: of the records. signals: name -> ``(n,)``. lengths: ``(n, 2)`` characters of question and answer. measured: the folder of the
            vectors that the run measured, see :mod:`selectune.examples.factors.store`.
    """
    name, values = _vectors(keys, measured) or _of_signals(signals, lengths)
    places, share = principal(values)
    return Plane(places, name, share)


def _of_signals(signals: Mapping[str, Array], lengths: Array) -> tuple[str, Array]:
    columns = [np.log1p(lengths[:, 0]), np.log1p(lengths[:, 1]), *signals.values()]
    return ", ".join([*signals, "lengths of question and answer"]), np.stack([_standard(column) for column in columns], axis=1)


def _standard(column: Array) -> Array:
    """Return a column with mean 0 and deviation 1, what is not finite in the middle, outliers at four deviations."""
    known = np.isfinite(column)
    if not known.any():
        return np.zeros(len(column))
    filled = np.where(known, column, np.median(column[known]))
    deviation = filled.std()
    return np.clip((filled - filled.mean()) / deviation, -4, 4) if deviation > 0 else np.zeros(len(column))


def _vectors(keys: Sequence[str], measured: Path) -> tuple[str, Array] | None:
    """Return the best vectors that were measured of every record, and their name in words."""
    import pandas as pd

    folders = sorted(measured.glob("*"), key=lambda folder: folder.name) if measured.is_dir() else []
    wanted = set(keys)
    for beginning in PREFERRED:
        for folder in folders:
            known: dict[str, Array] = {}
            for file in sorted(folder.glob("part-*.parquet")) if folder.name.startswith(beginning) else ():
                part = pd.read_parquet(file)
                part = part[part["key"].isin(wanted)]
                known |= dict(zip(part["key"], part["value"], strict=True))
            if known and all(key in known for key in keys):
                return folder.name.rpartition("-")[0].replace("-", " "), np.stack([known[key] for key in keys])
    return None
