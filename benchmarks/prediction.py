"""Does `selectune plan` say beforehand what a run then takes?

Plans and then runs a few specialisations of the built-in base on GSM8K, each in a process of its own (as a user would), and sets
the predicted beside the measured: seconds and peak memory of the training stage, operations, seconds of choosing.

    python benchmarks/prediction.py --data-root ../shared/data [--cells lora full] [--records 60] [--steps 12]
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CELLS: dict[str, dict[str, Any]] = {
    "lora": {"form": "lora"},
    "full": {"form": "full"},
    "last_blocks": {"form": "full", "parameters": "last_blocks:k=6"},
    "fisher_blocks": {"form": "full", "parameters": "fisher_blocks:k=8,examples=32"},
    "qlora": {"form": "qlora"},
    "lora_auto": {"form": "lora", "training": {"micro_batch_sequences": "auto"}},
}
MEASURED = {"target": "off", "benchmarks": [], "forgetting": False, "samples": 0}

PLAN = "import selectune, json, sys; print(selectune.plan(recipe=json.loads(sys.argv[1]), quiet=True).model_dump_json())"
RUN = """
import json, sys, selectune
run = selectune.specialize(recipe=json.loads(sys.argv[1]), quiet=True)
print(json.dumps({cost.stage: cost.model_dump() for cost in run.costs()}))
"""


def ask(script: str, recipe: dict[str, Any]) -> Any:
    """Run a script on a recipe in a process of its own and return the JSON of its last line."""
    done = subprocess.run([sys.executable, "-c", script, json.dumps(recipe)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Plan and run each cell, and write ``results/prediction.json`` again after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--records", type=int, default=60)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path, default=RESULTS / "prediction.json")
    given = parser.parse_args()
    found = json.loads(given.output.read_text(encoding="utf-8")) if given.output.exists() else {}
    for name in given.cells:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder, "gsm8k.jsonl")
            data.write_bytes(gzip.decompress((given.data_root / "gsm8k/train.jsonl.gz").read_bytes()))
            cell = CELLS[name]
            recipe = {
                "name": name, "output": folder, "evaluation": MEASURED, **cell,
                "data": {"train": str(data), "limit": given.records, "dev_fraction": 0.005},
                "training": {"epochs": 50, "max_steps": given.steps, "evaluations": 2, **cell.get("training", {})},
            }  # fmt: skip
            plan, costs = ask(PLAN, recipe), ask(RUN, recipe)
        train = costs["train"]
        pairs = {
            "seconds": (plan["seconds"], train["seconds"]),
            "memory_bytes": (plan["memory_bytes"], train["peak_memory_bytes"]),
            "counted_memory_bytes": (sum(plan["memory_parts"].values()), train["peak_memory_bytes"]),
            "flops": (plan["flops"], train["flops"]),
            "seconds_of_choosing": (plan["seconds_of_choosing"], costs["choose"]["seconds"]),
        }
        found[name] = {"records": given.records, "steps": given.steps, "micro_batch_sequences": plan["micro_batch_sequences"]}
        print(f"{name}:")
        for key, (predicted, measured) in pairs.items():
            found[name][key] = {"predicted": predicted, "measured": measured, "ratio": round(predicted / measured, 3)}
            print(
                f"  {key:22} predicted {predicted:16,.1f}  measured {measured:16,.1f}  ratio {predicted / measured:.2f}",
                flush=True,
            )
        given.output.parent.mkdir(exist_ok=True)
        given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
