"""Are our predictions those of lm-eval's own ``hf`` backend, item by item?

Both read the same local files through the same tasks; lm-eval runs in fp32 at batch size 1, ours in whatever is fast here.

    python benchmarks/lm_eval_equality.py --data-root ../shared/data --hellaswag 200 --gsm8k 50 --mmlu 1000
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import torch

from selectune.evaluation import Scorer
from selectune.evaluation.benchmarks import BENCHMARKS, _load_tasks
from selectune.evaluation.lm import ScorerLM
from selectune.models import Base, bf16_is_fast, load_base


def answers(lm: Any, name: str, data_root: Path, items: int, few_shot: int | None) -> tuple[list[dict[str, Any]], float]:
    """Return lm-eval's samples and the seconds they took."""
    from lm_eval.evaluator import evaluate

    tasks = _load_tasks(BENCHMARKS[name], str(data_root), few_shot)
    begin = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        found = evaluate(lm=lm, task_dict={"tasks": {t.config.task: t for t in tasks}, "groups": {}, "group_map": {}},
                         limit=items, log_samples=True, bootstrap_iters=0)  # fmt: skip
    seconds = time.perf_counter() - begin
    samples = [sample for task in tasks for sample in found["samples"][task.config.task]]
    return [s for s in samples if s.get("filter", "none") in ("none", "flexible-extract")], seconds


def decisions(sample: dict[str, Any], metric: str) -> Any:
    """Return what was decided on an item: the metric's value, and the choice or the answer."""
    replies = sample["filtered_resps"]
    if metric == "exact_match":
        return float(sample[metric]), str(replies[0])
    scores = [float(reply[0]) for reply in replies]
    if metric == "acc_norm":
        scores = [score / len(call[1]) for score, call in zip(scores, sample["arguments"], strict=True)]
    return float(sample[metric]), max(range(len(scores)), key=lambda i: scores[i])


def compare(base: Base, name: str, data_root: Path, items: int, few_shot: int | None = None) -> dict[str, Any]:
    """Score one benchmark both ways and compare item by item."""
    from lm_eval.models.huggingface import HFLM

    exact = load_base(base.spec, dtype=torch.float32)
    theirs, their_seconds = answers(
        HFLM(pretrained=exact.model, tokenizer=exact.tokenizer, batch_size=1, dtype="float32", device="cpu"),
        name, data_root, items, few_shot,
    )  # fmt: skip
    ours, our_seconds = answers(
        ScorerLM(Scorer(base.model, base.tokenizer, bfloat16=bf16_is_fast() and base.dtype == torch.bfloat16)),
        name, data_root, items, few_shot,
    )  # fmt: skip
    metric = BENCHMARKS[name].metric
    pairs = [(decisions(a, metric), decisions(b, metric)) for a, b in zip(ours, theirs, strict=True)]
    return {
        "benchmark": name, "items": len(pairs), "equal": sum(a == b for a, b in pairs),
        "score_ours": sum(a[0] for a, _ in pairs) / len(pairs), "score_lm_eval": sum(b[0] for _, b in pairs) / len(pairs),
        "items_per_second_ours": len(pairs) / our_seconds, "items_per_second_lm_eval": len(pairs) / their_seconds,
        "different": [{"index": i, "ours": a, "lm_eval": b} for i, (a, b) in enumerate(pairs) if a != b],
    }  # fmt: skip


def main() -> None:
    """Compare the three benchmarks and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--hellaswag", type=int, default=200)
    parser.add_argument("--gsm8k", type=int, default=50)
    parser.add_argument("--mmlu", type=int, default=1000, help="items of each of the four subjects")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "lm_eval_equality.json")
    arguments = parser.parse_args()
    base = load_base(arguments.base)
    found = []
    for name, items in (("hellaswag", arguments.hellaswag), ("mmlu_cs", arguments.mmlu), ("gsm8k", arguments.gsm8k)):
        if items:
            found.append(compare(base, name, arguments.data_root, items))
            print(json.dumps(found[-1]), flush=True)
            arguments.output.parent.mkdir(exist_ok=True)
            arguments.output.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
