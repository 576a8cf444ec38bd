"""Does what is missing of an experiment, some pieces at a time, each in a forked process.

Knows: the order of work, when to stop, and what to record when a piece fails or its process dies. The base is loaded once, by a process
that never computes: each piece starts from a copy of it that costs nothing, bit-identical whatever the piece before did, and its memory is
measured from the same beginning. Does not know: what a piece does, or what its result means.
"""

from __future__ import annotations

import gc
import importlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from selectune import recipe as recipes
from selectune.errors import EXIT_INTERRUPTED, UserError
from selectune.experiment import jobs
from selectune.experiment.budget import Facts
from selectune.experiment.forked import EXIT_DISK, EXIT_LATE, Forked, alone, reason
from selectune.experiment.plan import Missing, Plan, Slot
from selectune.experiment.progress import Bar
from selectune.experiment.protocol import Protocol
from selectune.experiment.record import facts_of, take_up
from selectune.experiment.store import Choice, Measured, Piece, Store, Trial
from selectune.models import accelerator, bf16_is_fast, environment, load_base
from selectune.run import write_atomically
from selectune.training import Interrupted

_OF_EVERY_PIECE = (
    "peft",
    "accelerate",
    "transformers.models.auto.modeling_auto",
    "selectune.adapters",
    "selectune.evaluation.forgetting",
    "selectune.evaluation.target",
    "selectune.parameters",
    "selectune.training.predict",
)
"""Modules that would be imported again in every forked process."""


@dataclass
class Job:
    """A piece of work that is being done."""

    where: str
    keys: list[str]
    """Of what it does, one after the other."""
    empty: Piece
    """What is recorded of each that it has not done, with the reason, when it dies."""
    process: Forked
    minutes: float | None
    """That it may take."""
    begin: float = field(default_factory=time.monotonic)


class Runner:
    """Works on an experiment in its folder.

    Args:
        only, task: work on this method, or this task, alone. minutes: begin no piece of work after so many.
        workers: so many pieces are done at a time, each with its share of the threads.
        record: the JSON of an earlier page; what it holds and the folder lacks is not done again. retry_failed: what failed is.
    """

    def __init__(
        self,
        protocol: Protocol,
        only: str | None = None,
        task: str | None = None,
        minutes: float | None = None,
        quiet: bool = False,
        workers: int = 1,
        record: Path | None = None,
        retry_failed: bool = False,
    ) -> None:
        self.record, self.retry_failed = record, retry_failed
        self.protocol, self.only, self.task, self.quiet, self.workers = protocol, only, task, quiet, workers
        self.store = Store(Path(protocol.output) / protocol.name)
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._threads = max(1, torch.get_num_threads() // workers)
        self._stopped = False
        self._bar: Bar | None = None

    @property
    def _late(self) -> bool:
        return self._stopped or (self._end is not None and time.monotonic() >= self._end)

    def run(self) -> None:
        """Do what is missing until it is done, the time is up, or Ctrl-C.

        Raises:
            UserError: a mistake in the protocol's base or data, a disk that cannot be written, or a folder in use.
            KeyboardInterrupt: after Ctrl-C, at the end of a training step.
        """
        with alone(self.store.folder), self._signals():
            torch.set_num_threads(1)  # until a piece is forked
            for name in _OF_EVERY_PIECE:
                importlib.import_module(name)
            facts = self._load()
            gc.freeze()  # a collection in a forked process, of which each training begins with one, leaves alone what is there already
            plan = Plan(self.protocol, facts, self.store)
            self.take_up(plan)
            for name in self.protocol.tasks:
                if self.task in (None, name) and not self._late:
                    self._prepare(plan, name)
            self._work(plan)
        if self._stopped:
            raise KeyboardInterrupt

    def take_up(self, plan: Plan) -> None:
        """Go on from the record; failures are forgotten afterwards, since it may hold some."""
        found = take_up(plan, self.record) if self.record is not None else 0
        if self.retry_failed:
            self.store.forget_failures()
        if found and not self.quiet:
            print(f"{found} cells are there already, in {self.record}.", file=sys.stderr)

    def _load(self) -> Facts:
        machine, wanted = self._machine(), self.protocol.training.precision
        bfloat16 = wanted == "bfloat16" or (wanted == "auto" and machine["bf16_is_fast"])
        self.base = load_base(self.protocol.base, dtype="auto" if bfloat16 else "float32", device="cpu",
                              trust_remote_code=self.protocol.trust_remote_code)  # fmt: skip
        anatomy = self.base.anatomy
        facts = Facts(fingerprint=self.base.fingerprint, total_parameters=anatomy.total_parameters, bfloat16=bfloat16,
                      blocks=[sum(anatomy.sizes[name] for name in block.parameters) for block in anatomy.blocks])  # fmt: skip
        self._same_precision(facts)
        write_atomically(self.store.facts, facts.model_dump_json(indent=1))
        return facts

    def _machine(self) -> dict[str, Any]:
        """Return what the machine is, as another process found it: forks of one that has asked a GPU's driver cannot use it.

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """
        file = self.store.folder / "environment.json"

        def look() -> None:
            found = environment() | {"bf16_is_fast": bf16_is_fast(), "threads": self._threads, "workers": self.workers}
            write_atomically(file, json.dumps(found, indent=1))

        self._finish(Job("machine", [], Piece(), Forked(look, self._threads), None))
        if self._stopped:
            raise KeyboardInterrupt
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def _same_precision(self, facts: Facts) -> None:
        """Refuse to begin anew, because this machine computes in another precision, what was begun elsewhere.

        Raises:
            UserError: the experiment leaves the precision to the machine.
        """
        begun = Facts.model_validate_json(self.store.facts.read_bytes()) if self.store.facts.exists() else facts_of(self.record)
        if self.protocol.training.precision != "auto" or begun is None or begun.bfloat16 == facts.bfloat16:
            return
        was, here = ("bfloat16" if one.bfloat16 else "float32" for one in (begun, facts))
        raise UserError(
            f"this experiment was begun in {was}, and this machine computes faster in {here}",
            file=self.record if not self.store.facts.exists() else self.store.folder, field="training.precision",
            mend=f"go on where it was begun; or say 'precision: {was}' to go on here, slowly; or '{here}' to do every cell anew")  # fmt: skip

    def _prepare(self, plan: Plan, name: str) -> None:
        """Prepare a task's records and measure the base on it; what is wrong here is wrong for every cell."""
        task, data, key, measured = self.protocol.tasks[name], plan.data(name), plan.data_keys[name], plan.measured_key(name)
        folder = self.store.room("data", key)
        if not folder.is_dir():
            self._do("data", key, Piece(), lambda: jobs.prepare(task, data, folder, plan.pool(name)))
            self._must("data", key, f"preparing {name}")
        if not self._late and not self.store.file("measured", measured).exists():
            training = {"precision": self.protocol.training.precision}
            recipe = recipes.parse({"base": self.protocol.base, "data": data.model_dump(), "training": training})
            room = self.store.room("measured", measured)
            self._do("measured", measured, Measured(), lambda: jobs.measure_base(recipe, task, folder, self.base, room))
            self._must("measured", measured, f"measuring the base on {name}")

    def _must(self, where: str, key: str, what: str) -> None:
        """Raise what a piece failed with, and forget it."""
        file = self.store.file(where, key)
        failed = json.loads(file.read_text(encoding="utf-8"))["failed"] if file.exists() else None
        if failed:
            file.unlink()
            raise UserError(f"{what}: {failed}")

    def _work(self, plan: Plan) -> None:
        """Do the missing pieces in the order of the cells, so many at a time; a cell that waits for another is asked again later."""
        slots, running = list(plan.slots(self.only, self.task)), dict[Slot, Job]()
        with Bar(plan, slots, self.quiet, self.workers) as self._bar:
            try:
                while True:
                    for slot in [slot for slot in slots if slot not in running]:
                        if len(running) == self.workers or self._late:
                            break
                        if self._next(plan, slot, running):
                            slots.remove(slot)
                    if not running:
                        return
                    slot, job, status = self._wait(running)
                    done = [one for one in slots if plan.choice_key(one) in job.keys] if job.where == "choices" else [slot]
                    self._bar.took(done, job.where, (time.monotonic() - job.begin) / len(job.keys))
                    self._ended(job, status)
            finally:
                self._end_all(running)

    def _next(self, plan: Plan, slot: Slot, running: dict[Slot, Job]) -> bool:
        """Begin the next piece of a cell, if nobody else does it; return whether the cell is finished, or has failed."""
        while (missing := plan.next(slot)) is not None:
            if any(missing.key in job.keys for job in running.values()):
                return False
            job = self._piece(plan, slot, missing)
            if job is not None:
                running[slot] = job
                assert self._bar is not None
                self._bar.doing({slot: job.where for slot, job in running.items()})
                return False
        if running and plan.cell(slot).failed is not None:  # it may wait for a cell that is being worked on
            return False
        plan.tidy(slot)
        assert self._bar is not None
        self._bar.finished(slot)
        return True

    def _wait(self, running: dict[Slot, Job]) -> tuple[Slot, Job, int]:
        """Wait until one of them has ended, take it out, and return its cell, itself and its exit status."""
        while True:
            for slot, job in running.items():
                if (status := job.process.status()) is not None:
                    return slot, running.pop(slot), status
            self._tick(running.values())

    def _end_all(self, running: dict[Slot, Job]) -> None:
        """End what is still running, after an error."""
        for job in running.values():
            job.process.tell()
        for job in running.values():
            while job.process.status() is None:
                time.sleep(0.02)

    def _piece(self, plan: Plan, slot: Slot, missing: Missing) -> Job | None:
        """Begin a piece of work; None where another must be done before."""
        store, recipe, base, task = self.store, missing.recipe, self.base, self.protocol.tasks[slot.task]
        data, room = store.room("data", plan.data_keys[slot.task]), store.room(missing.where, missing.key)
        if missing.where == "choices":
            library, kept, minutes = (
                store.room("signals", plan.signals_key(slot)),
                dict[Any, Any](),
                self.protocol.choosing_minutes,
            )
            together = plan.together(slot)
            works = {key: partial(jobs.choose, plan.recipe(one), data, base, store.room("choices", key), plan.fitted(one), library, kept)
                     for key, one in together.items()}  # fmt: skip
            return self._begin("choices", works, Choice(), None if minutes is None else minutes * len(works))
        if missing.where == "trials":
            chosen = store.chosen(missing.choice_key)
            empty = Trial(learning_rate=recipe.training.learning_rate or 0.0)
            return self._begin("trials", {missing.key: lambda: jobs.train(recipe, data, base, room, chosen)}, empty)
        trained = store.room("trials", missing.trial_key)
        if not (trained / "specialist").is_dir():  # it was beaten once, and removed
            store.file("trials", missing.trial_key).unlink()
            return None
        known = store.read(Measured, "measured", plan.measured_key(slot.task))
        assert known is not None
        cell, before = plan.unmeasured(slot, missing), known.benchmarks
        return self._begin("cells", {missing.key: lambda: cell.model_copy(
            update={"benchmarks": jobs.measure(recipe, task, base, trained, before)})}, cell)  # fmt: skip

    def _begin(self, where: str, works: Mapping[str, Callable[[], Piece]], empty: Piece, minutes: float | None = None) -> Job:
        """Begin pieces, one after the other, in a process of their own; the result of each, or why there is none, is one file. After so
        many minutes those that are not done have failed."""

        def recorded() -> None:
            for key, work in works.items():
                try:
                    self.base.model.to(accelerator())
                    piece = work()
                except Interrupted:  # no failure: it has left a checkpoint
                    raise
                except Exception as error:
                    piece = empty.model_copy(update={"failed": reason(error, self.store.folder / "errors" / f"{key}.txt")})
                if piece.failed or not self.store.file(where, key).exists():  # a choice may be made again for its folder alone
                    self.store.write(where, key, piece)

        process = Forked(recorded, self._threads, None if minutes is None else 60 * minutes)
        return Job(where, list(works), empty, process, minutes)

    def _ended(self, job: Job, status: int) -> None:
        """Record what a piece that has died died of.

        Raises:
            UserError: the disk cannot be written.
        """
        if status == EXIT_DISK:
            raise UserError("the disk is full or cannot be written", file=self.store.folder,
                            mend="free space, or name another output; then the same command goes on")  # fmt: skip
        if status == EXIT_INTERRUPTED or self._stopped:
            self._stopped = True
            return
        if status == EXIT_LATE:
            failed = f"not done after {job.minutes:g} minutes"
        elif status:
            time.sleep(1)  # whoever kills all processes has now killed this one too
            how = "was killed; out of memory, most likely" if status == -signal.SIGKILL else f"died (exit status {status})"
            failed = f"its process {how}"
        else:
            return
        for key in job.keys:
            if not self.store.file(job.where, key).exists():
                self.store.write(job.where, key, job.empty.model_copy(update={"failed": failed}))

    def _do(self, where: str, key: str, empty: Piece, work: Callable[[], Piece]) -> None:
        """Do a piece to its end, alone."""
        self._finish(self._begin(where, {key: work}, empty))

    def _finish(self, job: Job) -> None:
        """Wait for what is being done alone."""
        while (status := job.process.status()) is None:
            self._tick([job])
        self._ended(job, status)

    def _tick(self, jobs: Iterable[Job]) -> None:
        """Wait a moment; after Ctrl-C tell everyone."""
        if self._stopped:
            for job in jobs:
                job.process.tell()
        if self._bar is not None:
            self._bar.tick()
        time.sleep(0.02)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let Ctrl-C end the piece that is being done (a training writes a checkpoint), and then the experiment."""

        def stop(number: int, frame: Any) -> None:
            self._stopped = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
