"""The evidence machine: methods x tasks x budgets x seeds, run from one file, resumed at any moment, and a page with what it shows.

Knows: how an experiment is started in a process of its own. Does not know: what it may say (``protocol.py``), which cells it has
(``plan.py``), how they are run (``runner.py``, ``jobs.py``) or judged (``judging.py``).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from selectune.errors import EXIT_INTERRUPTED, UserError, nearest


def experiment(
    file: str | Path,
    *,
    only: str | None = None,
    task: str | None = None,
    minutes: float | None = None,
    page: str | Path | None = None,
    page_only: bool = False,
    data_root: str | None = None,
    retry_failed: bool = False,
    workers: int = 1,
    quiet: bool = False,
) -> Path:
    """Run what is missing of an experiment, and write its page.

    Args:
        file: the experiment, see docs/experiment.md. only, task: work on this method, or this task, alone.
        minutes: begin no piece of work (choosing, one training, one measurement) after so many.
        page: the Markdown file to write; left out, ``page.md`` in the experiment's folder. Its pictures and its JSON lie beside it.
        page_only: run nothing. data_root: instead of the file's own. retry_failed: do again what failed. quiet: show no progress.
        workers: so many pieces of work are done at a time, each with its share of the threads.

    Returns:
        The page, as it is so far.

    Raises:
        UserError: a mistake in the file or in the data. KeyboardInterrupt: after Ctrl-C; the same call goes on.
    """
    from selectune.experiment.protocol import load

    protocol = load(file)
    for what, given, known in (("method", only, [line.name for line in protocol.lines()]), ("task", task, list(protocol.tasks))):
        if given is not None and given not in known:
            raise UserError(f"has no {what} '{given}'{nearest(given, known)}", file=file, expected=f"one of {', '.join(known)}")
    written = Path(page) if page else Path(protocol.output) / protocol.name / "page.md"
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "error.json"
        options = {"only": only, "task": task, "minutes": minutes, "page": str(written), "page_only": page_only, "quiet": quiet,
                   "data_root": data_root, "retry_failed": retry_failed, "workers": workers, "parent": os.getpid(), "told": str(told)}  # fmt: skip
        status = _run([sys.executable, "-m", "selectune.experiment.worker", str(file), json.dumps(options)])
        if told.exists():
            raise UserError(**json.loads(told.read_text(encoding="utf-8")))
    if status == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        raise UserError(f"the experiment's process died (exit status {status})", file=file, mend="the same command goes on")
    return written


def _run(command: list[str]) -> int:
    """Run a command in a session of its own, and hand it the first Ctrl-C alone."""
    child: Any = subprocess.Popen(command, start_new_session=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    try:
        while True:
            try:
                return int(child.wait())
            except KeyboardInterrupt:
                child.send_signal(signal.SIGINT)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


class _Callable(types.ModuleType):
    """The folder has the name of the function: ``selectune.experiment(FILE)`` runs one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Path:
        return experiment(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
