"""The process in which an experiment runs: ``python -m selectune.experiment.worker FILE OPTIONS``, options as JSON.

Knows: that it ends when the one that started it is gone, and how to leave word of an error. Does not know: what an experiment does.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from selectune.errors import EXIT_INTERRUPTED, EXIT_MISTAKE, UserError
from selectune.experiment.budget import Facts
from selectune.experiment.page import write_page
from selectune.experiment.plan import Plan
from selectune.experiment.protocol import load
from selectune.experiment.record import facts_of
from selectune.experiment.runner import Runner
from selectune.run import write_atomically
from selectune.training.worker import end_with


def main() -> int:
    """Run an experiment and write its page; say by the exit status how it went."""
    file, options = sys.argv[1], json.loads(sys.argv[2])
    end_with(options["parent"])
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = (
        "1"  # whether there is a GPU is asked without a driver that forks could then not use
    )
    told = Path(options["told"])
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, once in every forked process
    try:
        protocol = load(file)
        protocol = protocol.model_copy(update={"data_root": options["data_root"] or protocol.data_root})
        page = Path(options["page"])
        record = page.with_suffix(".json")
        given: dict[str, Any] = {key: options[key] for key in ("only", "task", "minutes", "quiet", "workers", "retry_failed")}
        runner = Runner(protocol, record=record, **given)
        status = 0
        if not options["page_only"]:
            try:
                runner.run()
            except KeyboardInterrupt:
                status = EXIT_INTERRUPTED
        known = runner.store.facts
        facts = Facts.model_validate_json(known.read_bytes()) if known.exists() else facts_of(record)
        if facts is None and status == EXIT_INTERRUPTED:
            return status
        if facts is None:
            raise UserError("nothing was run yet", file=runner.store.folder, mend="run it without --page-only")
        plan = Plan(protocol, facts, runner.store)
        if options["page_only"]:
            runner.take_up(plan)
        write_page(plan, page)
        return status
    except UserError as error:
        values = {key: getattr(error, key) for key in ("problem", "line", "field", "expected", "mend")}
        write_atomically(told, json.dumps(values | {"file": None if error.file is None else str(error.file)}))
        return EXIT_MISTAKE


if __name__ == "__main__":
    sys.stdout.flush()
    os._exit(main())
