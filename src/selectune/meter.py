"""What a stage cost: seconds, tokens forward and backward, floating-point operations, peak memory, bytes written.

Knows: how to count, also across the attempts of a stage that was killed and taken up again. Does not know: what is being
counted. Choosing is not free, so choosing is metered like training.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from pydantic import BaseModel


class Cost(BaseModel):
    """The cost of one stage."""

    stage: str
    seconds: float = 0.0
    forward_tokens: int = 0
    backward_tokens: int = 0
    flops: float = 0.0
    """Floating-point operations of the matrix products: 2 per weight and token forward, 2 to 4 backward."""
    peak_memory_bytes: int = 0
    """Largest resident memory of the process (or of the accelerator, where one is used) during the stage."""
    bytes_written: int = 0
    trainings: int = 0
    """Copies of a model that were trained for a while, where choosing tries something."""

    def after(self, other: Cost) -> Cost:
        """Return the cost of both, one after the other: time adds up, memory does not."""
        both = self.plus(other)
        peak = max(self.peak_memory_bytes, other.peak_memory_bytes)
        return both.model_copy(update={"stage": other.stage, "seconds": self.seconds + other.seconds, "peak_memory_bytes": peak})

    def plus(self, other: Cost) -> Cost:
        """Return the cost of both, one beside the other: memory adds up, time does not."""
        return self.model_copy(update={
            "forward_tokens": self.forward_tokens + other.forward_tokens,
            "backward_tokens": self.backward_tokens + other.backward_tokens,
            "flops": self.flops + other.flops,
            "peak_memory_bytes": self.peak_memory_bytes + other.peak_memory_bytes,
            "bytes_written": self.bytes_written + other.bytes_written,
            "trainings": self.trainings + other.trainings,
        })  # fmt: skip


class Meter:
    """Measures one stage: ``with Meter("choose") as meter: ...; meter.cost``.

    Args:
        stage: its name. kept: a file for the cost so far, written every few seconds; what an earlier attempt left there is added.
        interval: seconds between two looks at the memory.
    """

    def __init__(self, stage: str, kept: Path | None = None, interval: float = 0.2) -> None:
        self.cost = Cost(stage=stage)
        self._interval, self._kept = interval, kept
        self._seconds_before = 0.0
        self._stop = threading.Event()
        self._process = psutil.Process()

    def count(
        self,
        *,
        forward: int = 0,
        backward: int = 0,
        flops: float = 0.0,
        written: int = 0,
        trainings: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Add tokens, operations, bytes, trainings or seconds that were spent elsewhere to the stage's cost."""
        self._seconds_before += seconds
        self.cost.forward_tokens += forward
        self.cost.backward_tokens += backward
        self.cost.flops += flops
        self.cost.bytes_written += written
        self.cost.trainings += trainings

    def since(self, before: Cost) -> dict[str, Any]:
        """Return what was counted since the cost was this, in the words of :meth:`count`; without the seconds."""
        now, words = self.cost, {"forward": "forward_tokens", "backward": "backward_tokens", "flops": "flops", "written": "bytes_written",
                                 "trainings": "trainings"}  # fmt: skip
        return {word: getattr(now, name) - getattr(before, name) for word, name in words.items()}

    def watch(self, model: Any, parameters: int) -> None:
        """Count, from now on, every token that enters a model and the operations of its matrix products.

        Args:
            model: a transformers model; copies that are made of it later count too. parameters: how many it has. All experts
                of a mixture are counted.
        """
        entry, head = model.get_input_embeddings(), model.get_output_embeddings()
        inner = parameters - entry.weight.numel() - (0 if head.weight is entry.weight else head.weight.numel())

        def enter(module: Any, inputs: Any) -> None:
            self.count(forward=inputs[0].numel(), flops=2.0 * inner * inputs[0].numel())

        def leave(module: Any, inputs: Any) -> None:
            self.count(flops=2.0 * module.weight.numel() * (inputs[0].numel() // inputs[0].shape[-1]))

        entry.register_forward_pre_hook(enter)
        head.register_forward_pre_hook(leave)

    def memory(self) -> int:
        """Return the memory in use now, in bytes, and remember it if it is the largest so far."""
        now = peak = self._process.memory_info().rss
        if (cuda := _accelerator_in_use()) is not None:
            now, peak = cuda.memory_allocated(), cuda.max_memory_allocated()
        self.cost.peak_memory_bytes = max(self.cost.peak_memory_bytes, peak)
        return now

    def __enter__(self) -> Meter:
        self._start = time.perf_counter()
        if self._kept is not None and self._kept.exists():
            self.cost = Cost.model_validate_json(self._kept.read_text(encoding="utf-8"))
            self._seconds_before = self.cost.seconds
        if (cuda := _accelerator_in_use()) is not None:
            cuda.reset_peak_memory_stats()
        self.memory()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.memory()
        self.cost.seconds = self._seconds_before + time.perf_counter() - self._start
        if error is not None:
            self._keep()

    def _watch(self) -> None:
        written = self._start
        while not self._stop.wait(self._interval):
            self.memory()
            if time.perf_counter() - written > 3:
                written = time.perf_counter()
                self._keep()

    def _keep(self) -> None:
        if self._kept is None:
            return
        so_far = self.cost.model_copy(update={"seconds": self._seconds_before + time.perf_counter() - self._start})
        beside = self._kept.with_suffix(".new")
        with contextlib.suppress(OSError):  # a full disk is told of by whoever writes a result
            beside.write_text(so_far.model_dump_json(), encoding="utf-8")
            beside.replace(self._kept)


def _accelerator_in_use() -> Any:
    """Return ``torch.cuda`` where something of this process lies on a GPU; nothing is imported, and no driver asked, to find out."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
