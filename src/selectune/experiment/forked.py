"""Pieces of work in forked processes.

Knows: how a process is forked, told to end, waited for, and how its failures are put into one line. Does not know: the work.

The forking process must not have computed with several threads: their pool would be missing in its child.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from selectune.errors import EXIT_INTERRUPTED, UserError, out_of_memory, unwritable
from selectune.training import Interrupted
from selectune.training.worker import end_with

EXIT_DISK, EXIT_LATE = 74, 75
_PATIENCE = 10.0  # seconds for processes that were killed to let go of the folder


class Forked:
    """Some work in a process of its own.

    Args:
        threads: with which it computes. seconds: after which it is killed, and its status is ``EXIT_LATE``.
    """

    def __init__(self, work: Callable[[], None], threads: int, seconds: float | None = None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._told = self._late = False
        self._child = os.fork()
        if self._child == 0:
            os._exit(_status_of(work, threads))

    def tell(self) -> None:
        """Tell it to end, once, as by Ctrl-C."""
        if not self._told:
            self._told = True
            os.kill(self._child, signal.SIGINT)

    def status(self) -> int | None:
        """Return its exit status (negative: the signal that ended it), once; None while it runs."""
        found, status = os.waitpid(self._child, os.WNOHANG)
        if found:
            return EXIT_LATE if self._late else os.waitstatus_to_exitcode(status)
        if time.monotonic() > self._end and not self._late:
            self._late = True
            os.kill(self._child, signal.SIGKILL)
        return None


def _status_of(work: Callable[[], None], threads: int) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    end_with(os.getppid())
    torch.set_num_threads(threads)
    try:
        work()
    except (KeyboardInterrupt, Interrupted):
        return EXIT_INTERRUPTED
    except OSError:
        return EXIT_DISK
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def reason(error: Exception, details: Path) -> str:
    """Return why a piece failed, in one line; where an unexpected error came from goes to a file.

    Raises:
        OSError: the disk is full or cannot be written, which is no failure of the piece.
    """
    met = error.__context__ if isinstance(error, UserError) else error
    if met is not None and (why := unwritable(met)) is not None:
        raise OSError(errno.ENOSPC, why) from error
    if isinstance(error, UserError):
        return _one_line(error.problem, error.expected)
    if out_of_memory(error):
        return "out of memory"
    details.parent.mkdir(exist_ok=True)
    details.write_text(traceback.format_exc(), encoding="utf-8")
    return _one_line(f"{type(error).__name__}: {error}")


def _one_line(*parts: str | None) -> str:
    return " ".join("; expected ".join(filter(None, parts)).split())[:300]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder; every forked process holds it too, so it is free only when all have ended.

    Raises:
        UserError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        begin = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - begin > _PATIENCE:
                    raise UserError("is being worked on by another process", file=folder, mend="wait for it, or end it") from None
                time.sleep(0.2)
        yield
