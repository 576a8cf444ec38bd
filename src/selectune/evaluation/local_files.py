"""Local copies of the benchmarks, in the form that the hub gives them.

Knows: where each benchmark's file lies under a data root, and how its rows become the fields that lm-eval's own task reads.
Does not know: prompts and metrics, which stay lm-eval's.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selectune.errors import UserError

Rows = dict[str, list[dict[str, Any]]]


def _open(root: Path, *names: str) -> Iterator[str]:
    for name in names:
        for path in (root / name, root / f"{name}.gz"):
            if path.is_file():
                content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                yield from io.StringIO(content.decode("utf-8"), newline="")
                return
    raise UserError("the benchmark's file is not there", file=root / names[0], field="evaluation.data_root",
                    mend="put it there, or leave data_root out to use the hub")  # fmt: skip


def _lines(root: Path, *names: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _open(root, *names) if line.strip()]


def _hellaswag(root: Path) -> Rows:
    return {"validation": _lines(root, "hellaswag/val_1k.jsonl", "hellaswag/hellaswag_val.jsonl")}


def _gsm8k(root: Path) -> Rows:
    return {"train": _lines(root, "gsm8k/train.jsonl"), "test": _lines(root, "gsm8k/test.jsonl")}


def _mmlu(subject: str) -> Callable[[Path], Rows]:
    def read(root: Path) -> Rows:
        rows: Rows = {}
        for split, folder in (("dev", "dev"), ("validation", "val"), ("test", "test")):
            cells = csv.reader(_open(root, f"mmlu/{folder}/{subject}_{folder}.csv", f"mmlu/{folder}/{subject}.csv"))
            rows[split] = [{"question": c[0], "subject": subject, "choices": c[1:5], "answer": "ABCD".index(c[5])} for c in cells]
        return rows

    return read


def _arc(level: str) -> Callable[[Path], Rows]:
    def read(root: Path) -> Rows:
        rows = []
        for row in _lines(root, f"arc/arc_{level}_test.jsonl"):
            letters = list("ABCDEFGH"[: len(row["choices"])])
            rows.append({
                "question": row["query"].removeprefix("Question: ").strip(),
                "choices": {"text": row["choices"], "label": letters},
                "answerKey": letters[row["gold"]],
            })  # fmt: skip
        return {"test": rows}

    return read


def _piqa(root: Path) -> Rows:
    rows = []
    for row in _lines(root, "piqa/val.jsonl"):
        goal = row["query"].removeprefix("Question: ").strip()
        rows.append({"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]})
    return {"validation": rows}


def _winogrande(root: Path) -> Rows:
    rows = []
    for row in _lines(root, "winogrande/val.jsonl"):
        first, second = row["context_options"]
        equal = next((i for i, pair in enumerate(zip(first, second)) if pair[0] != pair[1]), min(len(first), len(second)))
        start = first.rfind(" ", 0, equal) + 1  # the options differ in whole words
        sentence = f"{first[:start]}_ {row['continuation']}"
        rows.append({"sentence": sentence, "option1": first[start:], "option2": second[start:], "answer": str(row["gold"] + 1)})
    return {"validation": rows}


def _boolq(root: Path) -> Rows:
    rows = [
        {"question": row["question"], "passage": row["passage"], "label": int(str(row["answer"]).lower() == "true")}
        for row in _lines(root, "boolq/dev.jsonl")
    ]
    return {"validation": rows}


def _lambada(root: Path) -> Rows:
    rows = _lines(root, "lambada/lambada_openai.jsonl")
    return {"test": [{"text": f"{row['context'].rstrip(' ')} {row['continuation'].strip()}"} for row in rows]}


MMLU_CS = ("college_computer_science", "computer_security", "high_school_computer_science", "machine_learning")

READERS: dict[str, Callable[[Path], Rows]] = {
    "hellaswag": _hellaswag,
    "gsm8k": _gsm8k,
    "arc_easy": _arc("easy"),
    "arc_challenge": _arc("challenge"),
    "piqa": _piqa,
    "winogrande": _winogrande,
    "boolq": _boolq,
    "lambada_openai": _lambada,
    **{f"mmlu_{subject}": _mmlu(subject) for subject in MMLU_CS},
}
"""lm-eval task name -> reader."""
