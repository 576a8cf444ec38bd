"""How much planted noise does each method of choosing examples keep, and how many planted records of the target? No training on the choice.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.recovery            # goes on where it was left; new methods are picked up
    .venv/bin/python -m benchmarks.recovery --only loss --minutes 20
    .venv/bin/python -m benchmarks.recovery --share 1/2 & .venv/bin/python -m benchmarks.recovery --share 2/2    # on two cores

Writes benchmarks/results/examples_recovery.json (a method at a time) and the table benchmarks/results/examples.md. What is measured of a
record is shared by all methods and kept under runs/recovery. Pool and methods are those of benchmarks/examples.yaml.
Knows: the budgets, the order of work. Does not know: how a pool is planted or a choice judged (``selectune.experiment.planting``, ``recovery``).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import signal
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from selectune import catalogue
from selectune.data import Encoder, records_from_file
from selectune.examples import Pool
from selectune.experiment import jobs
from selectune.experiment.forked import Forked, reason
from selectune.experiment.lines import RANDOM, MethodLine
from selectune.experiment.planting import EXACT, IN_DOMAIN, NEAR, OFF_DOMAIN, WRONG, Account
from selectune.experiment.protocol import load
from selectune.experiment.recovery import choices, recovery
from selectune.models import bf16_is_fast, load_base
from selectune.run import fingerprint, write_atomically

HERE = Path(__file__).parent
WORK, RESULTS, TABLE = Path("runs/recovery"), HERE / "results" / "examples_recovery.json", HERE / "results" / "examples.md"
SCREENING = load(HERE / "examples.yaml")
TASK, LENGTH = SCREENING.tasks["mathematics"], SCREENING.training.max_length
BUDGETS = (0.05, 0.15, 0.3, 0.6)
KINDS = (WRONG, OFF_DOMAIN, EXACT, NEAR, IN_DOMAIN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default=str(HERE.parent.parent / "shared" / "data"))
    parser.add_argument("--only", help="one method")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="of one core, after which a method is given up (all budgets together)"
    )
    parser.add_argument("--share", default="1/1", help="every second method from the first one: 1/2")
    parser.add_argument("--retry", action="store_true", help="do again what failed or was given up")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base(SCREENING.base, dtype="fast")
    setting = fingerprint(
        {
            "task": TASK.model_dump(exclude_unset=True),
            "budgets": BUDGETS,
            "length": LENGTH,
            "base": base.fingerprint,
            "bfloat16": bf16_is_fast(),
        }
    )
    folder = WORK / setting
    if not (folder / "data").is_dir():
        jobs.prepare(TASK, TASK.data(asked.data_root, LENGTH), folder / "data", TASK.pool_under(asked.data_root))
    account = Account.model_validate_json((folder / "data" / jobs.PLANTED).read_bytes())
    found = _known(setting)
    first, step = (int(number) for number in asked.share.split("/"))
    for name, method, seed in _wanted(asked.only)[first - 1 :: step]:
        key, described = f"{name}, seed {seed}" if name == RANDOM else name, method.describe()
        before = found["methods"].get(key)
        same = before and all(
            described.get(name) == value for name, value in before["method"].items()
        )  # a new setting has its default
        if same and not (asked.retry and "failed" in before):
            continue
        begin = time.monotonic()
        result = _in_a_process(functools.partial(_measured, method, base, folder, account, seed), folder, 60 * asked.minutes)
        taken = {"method": described, "minutes": round((time.monotonic() - begin) / 60, 2), **result}
        found = _known(setting)  # another process may have written meanwhile
        found |= {"pool": account.sizes(), "budgets": BUDGETS}
        found["methods"][key] = taken
        write_atomically(RESULTS, json.dumps(found, indent=1))
        write_atomically(TABLE, _table(found))
        print(key, taken.get("failed") or {kind: round(one["area"], 2) for kind, one in taken["kinds"].items()}, flush=True)


def _known(setting: str) -> dict[str, Any]:
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return found if found.get("setting") == setting else {"setting": setting, "methods": {}}


def _wanted(only: str | None) -> list[tuple[str, Any, int]]:
    """Return every line of the screening that chooses before training with its seed, the control first, at each of its seeds."""
    lines = sorted((line for line in SCREENING.lines() if line.examples != "all" and only in (None, line.name)), key=_is_method)
    return [(line.name, catalogue.create("examples", line.examples), seed) for line in lines for seed in SCREENING.seeds_of(line)]


def _is_method(line: MethodLine) -> bool:
    return line.name != RANDOM


def _measured(method: Any, base: Any, folder: Path, account: Account, seed: int) -> dict[str, Any]:
    data = folder / "data"
    records, target = (records_from_file(data / f"{split}.jsonl") for split in ("train", "dev"))
    pool = Pool(
        records,
        lambda: base,
        lambda words: Encoder(words, LENGTH),
        target,
        seed,
        bfloat16=bf16_is_fast(),
        quiet=True,
        folder=folder,
    )
    places = choices(method, pool, BUDGETS)
    return {"kinds": recovery(places, pool, account), "records": {str(budget): len(chosen) for budget, chosen in places.items()}}


def _in_a_process(work: Any, folder: Path, seconds: float) -> dict[str, Any]:
    """Return what some work returns, or why there is nothing; after so many seconds of the processor's time it is given up."""
    told = folder / f"result-{os.getpid()}.json"

    def recorded() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        try:
            result = work()
        except Exception as error:
            result = {"failed": reason(error, folder / "errors" / f"{time.time_ns()}.txt")}
        write_atomically(told, json.dumps(result))

    told.unlink(missing_ok=True)
    process = Forked(recorded, 1)
    while (status := process.status()) is None:
        time.sleep(0.2)
    if status == -signal.SIGXCPU:
        return {"failed": f"not done after {seconds / 60:g} minutes of one core"}
    return (
        json.loads(told.read_text(encoding="utf-8")) if told.exists() else {"failed": f"its process died (exit status {status})"}
    )


def _table(found: dict[str, Any]) -> str:
    methods, sizes = found["methods"], found["pool"]
    done = {name: one for name, one in methods.items() if "kinds" in one}
    random = [one for name, one in done.items() if name.startswith("random,")]
    rows = {name: one for name, one in done.items() if not name.startswith("random,")}
    band = {kind: [one["kinds"][kind]["area"] for one in random] for kind in KINDS} if random else {}
    middle = str(0.15)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sizes.items())
    budgets = ", ".join(f"{budget:.0%}" for budget in found["budgets"])
    lines = [
        "# What each method of choosing examples keeps", "",
        f"A pool of {sum(sizes.values()):,} records: {kinds}. General records come from Alpaca, Dolly, LIMA, Code Alpaca and Evol-Instruct; the "
        "target is GSM8K, of which the methods see 24 other records; off-domain ones describe molecules. Every method chooses "
        f"{budgets} of the pool's trained tokens, set as in [the screening](examples_screening.md); nothing is trained on the choice.", "",
        "**Area**: under the curve of the share kept of a kind, over the share kept of plain general records. Random is 0.5, and 1/3 for "
        "duplicates (a copy counts only beside what it says again). For noise lower is better, for the target's records higher. **Bold**: "
        "better than every one of the random choices. `15 %`: share kept at that budget.", "",
        f"| method | {' | '.join(f'{kind}: area | 15 %' for kind in KINDS)} | records at 15 % |", "|---|" + "---|" * (2 * len(KINDS) + 1),
    ]  # fmt: skip
    if random:
        cells = [f"{fmean(band[kind]):.2f} [{min(band[kind]):.2f}, {max(band[kind]):.2f}] | "
                 f"{fmean(_kept(one, kind, found) for one in random):.0%}" for kind in KINDS]  # fmt: skip
        lines.append(
            f"| random, {len(random)} seeds | {' | '.join(cells)} | {fmean(one['records'][middle] for one in random):.0f} |"
        )
    for name, one in sorted(rows.items(), key=lambda item: _order(item[1])):
        cells = [
            f"{_bold(one['kinds'][kind]['area'], band.get(kind, []), kind)} | {_kept(one, kind, found):.0%}" for kind in KINDS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {one['records'][middle]} |")
    failed = [f"- {name}: {one['failed']}" for name, one in sorted(methods.items()) if "failed" in one]
    return "\n".join([*lines, *(["", "## Not there", "", *failed] if failed else [])]) + "\n"


def _order(one: dict[str, Any]) -> float:
    """By noise that is left out and target that is kept, alike."""
    areas = {kind: one["kinds"][kind]["area"] for kind in KINDS}
    return fmean(areas[kind] for kind in KINDS if kind != IN_DOMAIN) - areas[IN_DOMAIN]


def _kept(one: dict[str, Any], kind: str, found: dict[str, Any]) -> float:
    return float(one["kinds"][kind]["kept"][list(found["budgets"]).index(0.15)])


def _bold(area: float, band: list[float], kind: str) -> str:
    better = band and (area > max(band) if kind == IN_DOMAIN else area < min(band))
    return f"**{area:.2f}**" if better else f"{area:.2f}"


if __name__ == "__main__":
    main()
