"""Several processes train one model, each on its share of every batch.

Knows: whether there are several (as torch's and accelerate's launchers say it in the environment), what only the first of them may
do, how a run starts its own on one machine and how an error of one reaches the user.
Does not know: how a step is run; transformers and accelerate share out the batches and add up the gradients.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import psutil
import torch

from selectune.errors import UserError
from selectune.run import Run

ERROR = "training_error.json"
PARENT = "SELECTUNE_PARENT"
_HOST = "127.0.0.1"


class Interrupted(Exception):
    """Training ended at a step boundary because it was asked to; a checkpoint is there."""

    def __init__(self, step: int, steps: int) -> None:
        self.step, self.steps = step, steps
        super().__init__(f"stopped at step {step} of {steps}, with a checkpoint")


def count() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Return the number of this process among those that train together."""
    return int(os.environ.get("RANK", 0))


def first() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return rank() == 0


def wait() -> None:
    """Wait until every process is here."""
    if count() > 1:
        _state().wait_for_everyone()


def agree(value: Any) -> Any:
    """Return the first process's value in every process."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _state()
    return broadcast_object_list([value])[0]


def any_of(flag: bool) -> bool:
    """Whether a flag is set in any process."""
    if count() == 1:
        return flag
    found = torch.tensor(float(flag), device=_state().device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def _state() -> Any:
    """Join the others; a measurement by the first alone may take hours."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))


def start(run: Run, processes: int, quiet: bool) -> None:
    """Train a run in several processes on this machine, cores shared evenly, each on a GPU where there are any, and wait for them.

    Raises:
        UserError: GPUs are too few, what one of them raised, or that one died. Interrupted: Ctrl-C; a checkpoint was written.
    """
    from torch.distributed import TCPStore

    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UserError(f"each of {processes} processes trains on a GPU of its own, and there are {gpus}", field="training.processes",
                        expected=f"at most {gpus}", mend="lower it, or train on the CPU with CUDA_VISIBLE_DEVICES= before the command")  # fmt: skip
    threads = max(1, (psutil.cpu_count(logical=False) or 1) // processes)
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)  # from here on no other program can take its port
    together = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": _HOST, "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": str(threads), PARENT: str(os.getpid())}  # fmt: skip
    command = [sys.executable, "-m", "selectune.training.worker", str(run.folder.resolve()), *(["--quiet"] if quiet else [])]
    run.path(ERROR).unlink(missing_ok=True)
    children = [
        subprocess.Popen(
            command, env=os.environ | together | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=True
        )
        for rank in range(processes)
    ]
    asked: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in _signals()}
    try:
        told = 0
        while any(child.poll() is None for child in children):
            if len(asked) > told:
                told = len(asked)
                for child in children:
                    child.send_signal(signal.SIGINT)
            if any(child.poll() for child in children):  # one has failed: the others wait for it in vain
                time.sleep(1.0)
                for child in children:
                    child.kill()
            time.sleep(0.1)
    finally:
        for child in children:
            child.kill()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if run.path(ERROR).exists():
        told_by = json.loads(run.path(ERROR).read_text(encoding="utf-8"))
        run.path(ERROR).unlink()
        if "step" in told_by:
            raise Interrupted(**told_by)
        raise UserError(**told_by)
    if any(child.returncode for child in children):
        statuses = ", ".join(str(child.returncode) for child in children)
        raise UserError(f"a training process died (exit statuses {statuses})", field="training.processes",
                        mend="`selectune resume` goes on from the last checkpoint; with less memory, set training.processes: 1")  # fmt: skip


def _signals() -> list[signal.Signals]:
    main = threading.current_thread() is threading.main_thread()
    return [signal.SIGINT, signal.SIGTERM] if main else []
