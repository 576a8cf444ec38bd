"""The founding experiment: which tuning on which data moves which benchmark?

Repeats, at the scale of two cores, the study this project began with ("Slimming Down LLMs Without Losing Their Minds", arXiv
2506.10885): LoRA, QLoRA, full fine-tuning and Fisher blocks, each fine-tuned on HellaSwag train, GSM8K train and MMLU's
development and validation questions in turn, each measured on HellaSwag, GSM8K and MMLU computer science.

    python benchmarks/founding.py --data-root ../shared/data --output runs/founding

Every run is resumed where it was left; the table is written again after each run.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import time
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from selectune import pipeline
from selectune.errors import UserError
from selectune.run import DataSummary, Difference, Run, Scores, Verdict

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"form": "lora", "training": {"learning_rate": 5e-4}},
    "Fisher blocks (8 of 30)": {
        "form": "full",
        "parameters": "fisher_blocks:k=8,examples=32",
        "training": {"learning_rate": 1e-4},
    },
    "full": {"form": "full", "training": {"learning_rate": 5e-5}},
    "QLoRA": {"form": "qlora", "training": {"learning_rate": 5e-4}},
    "full, naive (learning rate 1e-3)": {"form": "full", "training": {"learning_rate": 1e-3}},
}
RESULTS = Path(__file__).parent / "results"
NAIVE = "full, naive (learning rate 1e-3)"
DATA = ("hellaswag", "gsm8k", "mmlu")
BENCHMARKS = ["hellaswag", "gsm8k", "mmlu_cs", "probe"]
ROWS = (
    "hellaswag",
    "hellaswag/answer_nll",
    "gsm8k",
    "gsm8k/answer_nll",
    "mmlu_cs",
    "mmlu_cs/answer_nll",
    "probe",
    "forgetting/cross_entropy",
)


def write_training_files(root: Path, folder: Path, records: dict[str, int]) -> None:
    """Write each data set's training records in its benchmark's own wording."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[tuple[str, str]]] = {"hellaswag": [], "gsm8k": [], "mmlu": []}
    for line in (root / "hellaswag/train_mc_1k.jsonl").read_text(encoding="utf-8").splitlines():
        value = json.loads(line)
        rows["hellaswag"].append((value["question"], value["choices"][value["answer"]]))
    with gzip.open(root / "gsm8k/train.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            value = json.loads(line)
            rows["gsm8k"].append((f"Question: {value['question']}\nAnswer:", value["answer"]))
    for path in sorted([*(root / "mmlu/dev").glob("*.csv"), *(root / "mmlu/val").glob("*.csv")]):
        with path.open(encoding="utf-8", newline="") as file:
            for cells in csv.reader(file):
                choices = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", cells[1:5], strict=True))
                rows["mmlu"].append((f"{cells[0].strip()}\n{choices}\nAnswer:", cells[5]))
    for name, pairs in rows.items():
        step = max(1, len(pairs) // records[name])  # spread over the whole file, so over all subjects
        text = "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs[::step][: records[name]])
        if not (folder / f"{name}.jsonl").exists():
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def records_of(arguments: argparse.Namespace) -> dict[str, int]:
    """Return the training records of each set; a solution of GSM8K is about twice as long as the others' records."""
    return {"hellaswag": arguments.records, "gsm8k": arguments.records // 2, "mmlu": arguments.records}


def items_of(arguments: argparse.Namespace) -> dict[str, int]:
    """Return the items of each benchmark: GSM8K is at its floor here and its answers are slow; its solutions' loss is not."""
    return {"hellaswag": arguments.items, "gsm8k": arguments.gsm8k_items, "mmlu_cs": arguments.mmlu_items}


def recipe_of(data: str, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return one cell's recipe."""
    folder = Path(arguments.output)
    short = method.split(" (")[0].replace(", ", "-").replace(" ", "-").lower()
    base = {
        "name": f"{data}-{short}",
        "output": str(folder),
        "data": {"train": str(folder / "data" / f"{data}.jsonl"), "test_fraction": 0.0, "dev_fraction": 0.05, "max_length": 384},
        "training": {"epochs": arguments.epochs, "evaluations": 2, "batch_sequences": 4, "micro_batch_sequences": 4},
        "evaluation": {"target": "off", "benchmarks": BENCHMARKS, "items": items_of(arguments), "few_shot": 0, "samples": 0,
                       "data_root": str(arguments.data_root)},
    }  # fmt: skip
    return pipeline.merge(base, METHODS[method])


def alignment(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return, for each training set and benchmark, how alike they are: the mean over the benchmark's items of the cosine
    between the item and the nearest training record, as vectors of word frequencies weighted by rarity."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    from selectune.evaluation import benchmark_texts

    asked = benchmark_texts(["hellaswag", "gsm8k", "mmlu_cs"], str(arguments.data_root), items_of(arguments))
    records = {}
    for name in DATA:
        lines = (Path(arguments.output) / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        records[name] = [f"{row['prompt']} {row['completion']}" for row in map(json.loads, lines)]
    words = TfidfVectorizer(sublinear_tf=True).fit([text for texts in (*asked.values(), *records.values()) for text in texts])
    return {
        data: {name: float((words.transform(items) @ words.transform(texts).T).toarray().max(1).mean())
               for name, items in asked.items()}
        for data, texts in records.items()
    }  # fmt: skip


def speeds(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return tokens per second and peak memory of each method, measured one after the other over a few steps on GSM8K."""
    found = {}
    for method in METHODS:
        if method == NAIVE:
            continue
        recipe = pipeline.merge(recipe_of("gsm8k", method, arguments), {
            "output": f"{arguments.output}/speed", "training": {"max_steps": 12, "evaluations": 0, "warmup_fraction": 0.0},
            "evaluation": {"benchmarks": [], "forgetting": False},
        })  # fmt: skip
        run = pipeline.specialize(recipe=recipe, quiet=True)
        lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if "loss" in line]
        train = next(cost for cost in run.costs() if cost.stage == "train")
        tokens, seconds = (steps[-1][key] - steps[1][key] for key in ("tokens", "seconds"))
        found[method] = {"tokens_per_second": tokens / seconds, "peak_memory_bytes": train.peak_memory_bytes}
        print(f"{method}: {found[method]}", flush=True)
    return found


def cell(difference: Difference) -> str:
    """Write a difference with its interval."""
    scale, digits = (1, 3) if difference.metric in ("answer_nll", "cross_entropy") else (100, 1)
    low, high = difference.low * scale, difference.high * scale
    return f"{difference.difference * scale:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def write_results(arguments: argparse.Namespace) -> None:
    """Write the JSON of every finished run, and the tables made from it."""
    found: list[dict[str, Any]] = []
    for data in DATA:
        for method in METHODS:
            run = Run(Path(arguments.output) / str(recipe_of(data, method, arguments)["name"]))
            if not run.has("verdict.json"):
                continue
            verdict, scores = run.read("verdict.json", Verdict), run.read("scores.json", Scores)
            costs = {cost.stage: cost for cost in run.costs()}
            found.append({
                "data": data, "method": method, "retained": verdict.retained,
                "records": run.read("data.json", DataSummary).splits, "trained_parameters": scores.trained_parameters,
                "train_seconds": costs["train"].seconds, "choose_seconds": costs["choose"].seconds,
                "peak_memory_bytes": costs["train"].peak_memory_bytes, "backward_tokens": costs["train"].backward_tokens,
                "differences": [difference.model_dump() for difference in verdict.differences],
                "trained_blocks": [block.block for block in scores.blocks if block.trained],
            })  # fmt: skip
    alike = alignment(arguments)
    for entry in found:
        losses = {
            d["benchmark"].split("/")[0]: -d["difference"] for d in entry["differences"] if d["benchmark"].endswith("/answer_nll")
        }
        entry["alignment"] = {name: {"similarity": alike[entry["data"]][name], "loss_reduction": losses[name]} for name in losses}
    RESULTS.mkdir(exist_ok=True)
    settings = {"records": records_of(arguments), "items": items_of(arguments), "epochs": arguments.epochs, "few_shot": 0}
    (RESULTS / "founding.json").write_text(json.dumps({"settings": settings, "runs": found}, indent=1), encoding="utf-8")
    lines = []
    for method in METHODS:
        runs = [entry for entry in found if entry["method"] == method]
        if not runs:
            continue
        lines += [f"### {method}", "", "| measured on | base | " + " | ".join(f"after {r['data']}" for r in runs) + " |",
                  "|---|---|" + "---|" * len(runs)]  # fmt: skip
        for name in ROWS:
            entries = [next(Difference(**d) for d in r["differences"] if d["benchmark"] == name) for r in runs]
            before = entries[0].before
            shown = f"{before:.3f}" if entries[0].metric in ("answer_nll", "cross_entropy") else f"{before:.1%}"
            lines.append(f"| {name} ({entries[0].items}) | {shown} | " + " | ".join(map(cell, entries)) + " |")
        lines.append("| verdict on retention | | " + " | ".join(r["retained"] for r in runs) + " |")
        lines.append("| trained parameters | | " + " | ".join(f"{r['trained_parameters']:,}" for r in runs) + " |")
        lines.append("")
    if (RESULTS / "founding_speed.json").exists():
        lines += ["### Time and memory", "", "| method | trained parameters | tokens/s | peak memory, GiB |", "|---|---|---|---|"]
        for method, values in json.loads((RESULTS / "founding_speed.json").read_text(encoding="utf-8")).items():
            trained = next((entry["trained_parameters"] for entry in found if entry["method"] == method), 0)
            lines.append(
                f"| {method} | {trained:,} | {values['tokens_per_second']:.0f} | {values['peak_memory_bytes'] / 2**30:.1f} |"
            )
        lines.append("")
    lines += ["### Alignment of data and benchmark", "", "Similarity, and the fall of the right answer's loss (nats per token) it went with:",
              "", "| method | " + " | ".join(f"{d} on {b}" for d in DATA for b in alike[d]) + " | rank correlation within a benchmark, mean |",
              "|---|" + "---|" * (len(DATA) * 3 + 1)]  # fmt: skip
    lines.append("| *similarity* | " + " | ".join(f"{alike[d][b]:.2f}" for d in DATA for b in alike[d]) + " | |")
    for method in METHODS:
        by_data = {entry["data"]: entry for entry in found if entry["method"] == method}
        if set(by_data) == set(DATA):
            pairs = [by_data[d]["alignment"][b] for d in DATA for b in alike[d]]
            each = []
            for name in alike[DATA[0]]:  # within a benchmark: losses of different benchmarks have different sizes
                column = [by_data[d]["alignment"][name] for d in DATA]
                found_here = spearmanr([p["similarity"] for p in column], [p["loss_reduction"] for p in column])
                each.append(float(found_here.statistic))
            reductions = " | ".join(f"{p['loss_reduction']:+.2f}" for p in pairs)
            lines.append(f"| {method} | {reductions} | {sum(each) / len(each):+.2f} |")
    (RESULTS / "founding_tables.md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """Run every cell that is not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/founding"))
    parser.add_argument("--records", type=int, default=320, help="training records of HellaSwag and MMLU; half as many of GSM8K")
    parser.add_argument("--items", type=int, default=200, help="items of HellaSwag")
    parser.add_argument("--gsm8k-items", type=int, default=40, help="items of GSM8K")
    parser.add_argument("--mmlu-items", type=int, default=60, help="items of each of the four MMLU subjects")
    parser.add_argument(
        "--methods", nargs="*", choices=list(METHODS), default=list(METHODS), help="only these, to share the work"
    )
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--table", action="store_true", help="only write the tables again")
    parser.add_argument("--data", nargs="*", choices=DATA, default=list(DATA), help="only after these, to share the work")
    parser.add_argument("--speed", action="store_true", help="only measure time and memory: on an otherwise idle machine")
    arguments = parser.parse_args()
    if arguments.speed:
        write_training_files(arguments.data_root, arguments.output / "data", records_of(arguments))
        (RESULTS / "founding_speed.json").write_text(json.dumps(speeds(arguments), indent=1), encoding="utf-8")
    elif not arguments.table:
        write_training_files(arguments.data_root, arguments.output / "data", records_of(arguments))
        for method in arguments.methods:
            for data in arguments.data if method != NAIVE else ["gsm8k"]:
                begin = time.perf_counter()
                try:
                    pipeline.specialize(recipe=recipe_of(data, method, arguments), quiet=True)
                except UserError as error:
                    print(f"{data}, {method}: {error}", flush=True)
                    continue
                print(f"{data}, {method}: {time.perf_counter() - begin:.0f} s", flush=True)
                write_results(arguments)
    write_results(arguments)


if __name__ == "__main__":
    main()
