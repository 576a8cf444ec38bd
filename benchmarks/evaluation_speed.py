"""How many items a second, ours against lm-eval's own ``hf`` backend at its best batch size and dtype.

Both run the same lm-eval tasks on the same local files, in one process, in turns. A short sweep finds lm-eval's best setting for
each task; then both are measured several times. Ours counts everything: its own checks, the fp32 copy, and near-ties in fp32.
Loading models and files is counted for neither. lm-eval's bf16 answers are not those of fp32, ours are: the sweep's best fp32 setting
is kept beside.

    python -m benchmarks.evaluation_speed --data-root ../shared/data
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.lm_eval_equality import answers
from selectune.evaluation import Scorer
from selectune.evaluation.lm import ScorerLM
from selectune.models import Base, bf16_is_fast, load_base
from selectune.models.machine import environment

TASKS: dict[str, tuple[str, int | None, int, int]] = {
    "HellaSwag, 0-shot": ("hellaswag", 0, 200, 12),
    "MMLU computer science, 0-shot": ("mmlu_cs", 0, 60, 3),
    "MMLU computer science, 5-shot": ("mmlu_cs", 5, 1000, 2),
    "GSM8K answers, 5-shot": ("gsm8k", 5, 4, 0),
    "HellaSwag, 10-shot": ("hellaswag", 10, 12, 4),
}
"""Benchmark, examples before each question, items (of each of the four subjects of MMLU), and items of the sweep."""
OPTIONAL = ("HellaSwag, 10-shot",)
BATCH_SIZES = (1, 4, 8, 16, 32)
GENERATION_BATCH = 4  # a sweep over answers would take longer than everything else: one batch holds all of them
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def busy_process() -> str | None:
    """Return a process that keeps a core busy, if there is one."""
    others = [process for process in psutil.process_iter(["name"]) if process.pid != os.getpid()]
    for process in others:
        try:
            process.cpu_percent()
        except psutil.Error:
            continue
    time.sleep(2)
    for process in others:
        try:
            share = process.cpu_percent()
        except psutil.Error:
            continue
        if share > 40:
            return f"{process.info['name']} (process {process.pid}, {share:.0f} % of a core)"
    return None


class Bench:
    """One base, measured on one task at a time."""

    def __init__(self, base: Base, data_root: Path) -> None:
        self.base, self.data_root = base, data_root
        self.models = {name: load_base(base.spec, dtype=dtype).model for name, dtype in DTYPES.items()}

    def theirs(self, name: str, few_shot: int | None, items: int, dtype: str, batch_size: int) -> float:
        """Return lm-eval's items a second."""
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=self.models[dtype], tokenizer=self.base.tokenizer, batch_size=batch_size, device="cpu")
        samples, seconds = answers(lm, name, self.data_root, items, few_shot)
        return len(samples) / seconds

    def ours(self, name: str, few_shot: int | None, items: int) -> tuple[float, int, int]:
        """Return our items a second, how many items there were, and how many were decided again in fp32."""
        fast = bf16_is_fast() and self.base.dtype == torch.bfloat16
        begin = time.perf_counter()
        scorer = Scorer(self.base.model, self.base.tokenizer, bfloat16=fast)
        made = time.perf_counter() - begin
        samples, seconds = answers(ScorerLM(scorer), name, self.data_root, items, few_shot)
        return len(samples) / (seconds + made), len(samples), scorer.decided_again

    def best_setting(self, name: str, few_shot: int | None, items: int) -> tuple[str, int, dict[str, float]]:
        """Return lm-eval's fastest dtype and batch size, and the items a second of each."""
        sizes = BATCH_SIZES if items else (GENERATION_BATCH,)
        found = {}
        for dtype in DTYPES:
            for size in sizes:
                found[dtype, size] = self.theirs(name, few_shot, items or GENERATION_BATCH, dtype, size)
                print(f"  lm-eval {dtype}, batch size {size}: {found[dtype, size]:.2f} items/s", file=sys.stderr, flush=True)
        dtype, size = max(found, key=lambda setting: found[setting])
        return dtype, size, {f"{dtype}, {size}": speed for (dtype, size), speed in found.items()}

    def measure(self, task: str, repeats: int, swept: dict[str, float] | None = None) -> dict[str, Any]:
        """Find lm-eval's best setting (in an earlier sweep, if there is one), then measure both in turns."""
        name, few_shot, items, sweep = TASKS[task]
        if swept:
            dtype, size = max(swept, key=lambda setting: swept[setting]).split(", ")
            batch, settings = int(size), swept
        else:
            dtype, batch, settings = self.best_setting(name, few_shot, sweep)
        ours: list[float] = []
        theirs = [] if sweep else [settings[f"{dtype}, {batch}"]]
        for _ in range(repeats):
            speed, count, again = self.ours(name, few_shot, items)
            ours.append(speed)
            if sweep:
                theirs.append(self.theirs(name, few_shot, items, dtype, batch))
        ratios = [a / b for a, b in zip(ours, theirs * (repeats if len(theirs) == 1 else 1), strict=True)]
        equal = max(speed for setting, speed in settings.items() if setting.startswith("fp32"))
        return {
            "task": task, "items": count, "decided_again_in_fp32": again, "ours": ours, "lm_eval": theirs,
            "lm_eval_setting": f"{dtype}, batch size {batch}", "sweep": settings,
            "ratio": statistics.median(ratios), "ratios": ratios,
            "lm_eval_fp32": equal, "ratio_to_fp32": statistics.median(ours) / equal,
        }  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """Return a markdown table: medians, and the lowest and highest ratio."""
    lines = ["| task | items | lm-eval's best setting | lm-eval items/s | ours items/s | ratio (lowest to highest) | decided again |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in found:
        lines.append(
            f"| {row['task']} | {row['items']} | {row['lm_eval_setting']} | {statistics.median(row['lm_eval']):.2f} "
            f"| {statistics.median(row['ours']):.2f} | **{row['ratio']:.1f}** ({min(row['ratios']):.1f} to {max(row['ratios']):.1f}) "
            f"| {row['decided_again_in_fp32']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every task and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=[task for task in TASKS if task not in OPTIONAL])
    parser.add_argument("--busy", action="store_true", help="measure although another process keeps a core busy")
    parser.add_argument("--swept", action="store_true", help="take lm-eval's best settings from the sweep in the output file")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "evaluation_speed.json")
    arguments = parser.parse_args()
    other = busy_process()
    if other and not arguments.busy:
        sys.exit(f"another process keeps a core busy: {other}. Wait for it, or measure anyway with --busy.")
    bench = Bench(load_base(arguments.base), arguments.data_root)
    before = json.loads(arguments.output.read_text(encoding="utf-8"))["tasks"] if arguments.output.exists() else []
    sweeps = {row["task"]: row["sweep"] for row in before} if arguments.swept else {}
    found = [row for row in before if row["task"] not in arguments.tasks]
    for task in arguments.tasks:
        print(task, file=sys.stderr, flush=True)
        found.append(bench.measure(task, arguments.repeats, sweeps.get(task)))
        result = {"base": arguments.base, "busy": other, "environment": environment(), "tasks": found}
        arguments.output.parent.mkdir(exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
