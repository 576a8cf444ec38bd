"""Signals measured on many machines, through Ray Data.

Knows: how batches of records go to workers that each load the base once, and come back as they are ready. Does not know: what a signal means, or
how values are kept (here, by whoever asked: a run that is killed goes on with what was kept, whatever became of the cluster).

The cluster is the one that ``RAY_ADDRESS`` names, or this machine. Selectune and the base must be there on every machine. A model that is in this
process's memory does not travel: what it measures is measured here.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from selectune.data.records import Record
from selectune.errors import UserError
from selectune.examples.factors.signals import Signal
from selectune.examples.pool import Pool
from selectune.meter import Meter

Array = np.ndarray
BLOCKS = 512
"""Pieces of work at most that Ray keeps account of."""


class _Measuring:
    """A worker: its base is loaded once, when it is first needed."""

    def __init__(self, given: bytes) -> None:
        self._signal, *self._given = pickle.loads(given)
        self._meter = Meter("measuring")

    @cached_property
    def _worker(self) -> Any:
        from selectune.examples.factors.signals import Worker

        load_base, make_encoder, bfloat16, seed = self._given
        base = load_base()
        return Worker(base, make_encoder(base.tokenizer), bfloat16, seed, self._meter)

    def __call__(self, rows: dict[str, Array]) -> dict[str, list[Any]]:
        """Measure one batch; what goes wrong is told, not raised, for it has to travel."""
        values, failed, cost = b"", "", self._meter.cost
        before = (cost.forward_tokens, cost.backward_tokens)
        try:
            worker = self._worker if self._signal.needs_base else None
            values = pickle.dumps(np.asarray(self._signal.measure(worker, pickle.loads(rows["records"][0]))))
        except Exception as error:
            failed = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        spent = (cost.forward_tokens - before[0], cost.backward_tokens - before[1])
        number = int(rows["number"][0])
        return {"number": [number], "values": [values], "failed": [failed], "forward": [spent[0]], "backward": [spent[1]]}


def packed(pool: Pool, signal: Signal) -> bytes | None:
    """Return what a worker measures with: the signal, and how it loads the base; None where that cannot travel."""
    from ray.cloudpickle import CloudPickler

    class WithoutModels(CloudPickler):  # type: ignore[misc]
        def reducer_override(self, thing: Any) -> Any:
            if isinstance(thing, nn.Module):
                raise pickle.PicklingError("a model in memory")
            return super().reducer_override(thing)

    needed = (pool.load_base, pool.make_encoder) if signal.needs_base else (None, None)
    given = io.BytesIO()
    try:
        WithoutModels(given).dump((signal, *needed, pool.bfloat16, pool.seed))
    except (pickle.PicklingError, TypeError, AttributeError):  # the last two: something of this process, such as a lock
        return None
    return given.getvalue()


def measured(
    pool: Pool, signal: Signal, batches: list[list[Record]], here: Iterator[tuple[int, Array]]
) -> Iterator[tuple[int, Array]]:
    """Give the number of each batch and its values, in whatever order they are ready.

    Args:
        here: the same from this process, for what cannot travel.

    Raises:
        UserError: Ray is not installed, the cluster cannot be reached or has no processor, or a worker failed.
    """
    try:
        import ray
    except ImportError:
        raise UserError("engine 'ray' needs Ray, which is not installed", field="engine",
                        mend="pip install 'selectune[ray]', or leave the engine out") from None  # fmt: skip
    given = packed(pool, signal)
    if given is None:
        note = f"{signal.shown}: measured in this process, by a model that no other machine can load"
        pool.notes += [note] if note not in pool.notes else []
        yield from here
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not ray.is_initialized():
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"the cluster cannot be reached ({error})", field="engine", mend="look at RAY_ADDRESS") from None
    from ray.data import ActorPoolStrategy, DataContext, from_items
    from ray.data.exceptions import SystemException

    DataContext.get_current().enable_progress_bars = False
    there = ray.cluster_resources()
    on_gpu = signal.needs_base and there.get("GPU", 0) >= 1
    workers = min(int(there.get("GPU" if on_gpu else "CPU", 0)), len(batches))
    if not workers:
        raise UserError("the cluster has no processor", field="engine", mend="start it with processors, or leave the engine out")
    rows = [{"number": number, "records": pickle.dumps(batch)} for number, batch in enumerate(batches)]
    done = from_items(rows, override_num_blocks=min(len(rows), BLOCKS)).map_batches(
        _Measuring,
        fn_constructor_args=(given,),
        batch_size=1,
        compute=ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=1 if on_gpu else 0,
    )
    mend = "what was measured is kept where a folder was named: mend it and run it again"
    try:
        for row in done.iter_rows():
            if row["failed"]:
                raise UserError(f"a worker of the cluster failed ({row['failed']})", field="engine", mend=mend)
            pool.meter.count(forward=int(row["forward"]), backward=int(row["backward"]))
            yield int(row["number"]), pickle.loads(row["values"])
    except (ray.exceptions.RayError, SystemException) as error:
        last = str(error).strip().splitlines()[-1:]
        raise UserError(f"the cluster failed ({(last or [type(error).__name__])[0]})", field="engine", mend=mend) from None
