"""One of several processes that a run has started to train it: ``python -m selectune.training.worker FOLDER``.

Knows: that it ends when the one that started it is gone, and how to leave word of an error. Does not know: how training goes.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from selectune.errors import UserError
from selectune.run import Run, write_atomically
from selectune.training.processes import ERROR, PARENT, Interrupted


def end_with(parent: int) -> None:
    """End this process when the one that started it is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Train, and say by the exit status whether it went well."""
    from selectune.pipeline.training import train_together

    folder, quiet = Path(sys.argv[1]), "--quiet" in sys.argv
    end_with(int(os.environ[PARENT]))
    run = Run.open(folder)
    told: dict[str, Any]
    try:
        train_together(run, quiet)
        return 0
    except Interrupted as interruption:
        told = {"step": interruption.step, "steps": interruption.steps}
    except UserError as error:
        told = {key: getattr(error, key) for key in ("problem", "line", "field", "expected", "mend")}
        told["file"] = None if error.file is None else str(error.file)
    write_atomically(run.path(ERROR), json.dumps(told))
    return 1


if __name__ == "__main__":
    sys.exit(main())
