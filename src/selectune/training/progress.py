"""What a person sees while training runs, and what is kept of it.

Knows: the progress bar (loss, tokens per second, time left, memory), ``metrics.jsonl``, and ending at a step boundary
when Ctrl-C is pressed. Does not know: how a step is computed.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import psutil
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from selectune.progress import CONSOLE
from selectune.training.processes import any_of


class ProgressAndMetrics(TrainerCallback):
    """Draws the bar and appends one JSON line per logged step.

    Args:
        metrics: the ``metrics.jsonl`` to append to; lines after the step that training starts from are dropped first.
        sequence_tokens: tokens in one step, padding not counted. speaks: of several processes, one writes and shows.
    """

    def __init__(self, metrics: Path, sequence_tokens: float, quiet: bool = False, speaks: bool = True) -> None:
        self._metrics, self._step_tokens, self._speaks = metrics, sequence_tokens, speaks
        quiet = quiet or not speaks
        self._process = psutil.Process()
        self._progress = Progress(
            TextColumn("training"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[numbers]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=CONSOLE, disable=quiet,
        )  # fmt: skip
        self._numbers = {"loss": "", "speed": "", "memory": ""}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._speaks:
            _truncate(self._metrics, state.global_step)
        self._begin, self._first_step = time.perf_counter(), state.global_step
        self._progress.start()
        self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step, numbers="")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self._begin
        self._speed = (state.global_step - self._first_step) * self._step_tokens / max(seconds, 1e-9)
        self._numbers["speed"] = f"{self._speed:,.0f} tokens/s"
        self._numbers["memory"] = f"{self._process.memory_info().rss / 2**30:.1f} GiB"
        self._progress.update(self._task, completed=state.global_step, numbers="  ".join(self._numbers.values()))

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        given = logs or {}
        kept: dict[str, Any] = {key: given[key] for key in ("loss", "eval_loss", "learning_rate", "grad_norm") if key in given}
        if not kept or not self._speaks:
            return
        if "loss" in kept:
            self._numbers["loss"] = f"loss {kept['loss']:.3f}"
        line: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch, **kept}
        if "loss" in kept:
            line |= {
                "tokens": round(state.global_step * self._step_tokens),
                "tokens_per_second": round(self._speed, 1),
                "seconds": round(time.perf_counter() - self._begin, 2),
            }
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._progress.stop()

    def stop(self) -> None:
        """Take the bar down, whatever happened."""
        self._progress.stop()


class EndAtStep(TrainerCallback):
    """Turns the first Ctrl-C (or termination) into a checkpoint at the next step boundary; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> EndAtStep:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old[number] = signal.signal(number, self._ask)
            except ValueError:  # not in the main thread: the caller keeps its own handling
                continue
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.asked = any_of(self.asked)
        if self.asked:
            control.should_save = control.should_training_stop = True


def _truncate(metrics: Path, step: int) -> None:
    """Drop the lines after ``step``: they belong to a part of the run that is done again."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # a line cut short by a kill
            continue
    metrics.write_text("".join(kept) if step else "", encoding="utf-8")
