"""How fast, and in how much memory, does the engine train, against TRL with PEFT?

    python -m benchmarks.engine --data-root ../shared/data

Every cell runs in a process of its own, cells in turn, several rounds; medians and spreads over rounds, and every figure a ratio against
a peer of the same round. SmolLM2-135M-Instruct, GSM8K, records packed to 512 tokens, two sequences in a step. Needs an otherwise
idle machine (a busy second core makes the barriers of two threads many times slower), and refuses a busy one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.peers import StepTimes, as_record, gsm8k, trl_trainer

RESULTS = Path(__file__).parent / "results"
LENGTH, BATCH, WARM = 512, 2, 2
CELLS: dict[str, dict[str, Any]] = {
    "TRL LoRA": {"peer": "lora", "steps": 6},
    "LoRA": {"form": "lora", "steps": 8},
    "LoRA, two processes": {"form": "lora", "steps": 8, "processes": 2},
    "TRL full": {"peer": "full", "steps": 6},
    "full": {"form": "full", "steps": 8},
    "full, two processes": {"form": "full", "steps": 8, "processes": 2},
    "6 of 30 blocks": {"form": "full", "blocks": 6, "steps": 8},
    "6 of 30 blocks, remembered": {"form": "full", "blocks": 6, "steps": 14, "warm": 6, "sequences": 12},
    "6 of 30 blocks, two processes": {"form": "full", "blocks": 6, "steps": 8, "processes": 2},
    "6 of 30 blocks, remembered, two processes": {
        "form": "full", "blocks": 6, "steps": 14, "warm": 6, "sequences": 12, "processes": 2,
    },
    "5 % of the weights: rows": {"form": "full", "part": "rows", "steps": 8},
    "5 % of the weights: blocks of 64": {"form": "full", "part": "blocks", "steps": 8},
    "5 % of the weights: entries": {"form": "full", "part": "elements", "steps": 8},
    "5 % of the weights: the last blocks": {"form": "full", "part": "last", "steps": 8},
}  # fmt: skip


def part_of(model: Any, anatomy: Any, kind: str, share: float = 0.05) -> Any:
    """Return a selection of a share of all weights: rows, columns, blocks or entries of every matrix of the blocks, or whole last blocks."""
    from selectune.parameters.selection import Part, Selection

    generator = torch.Generator().manual_seed(0)
    target, parts = share * anatomy.total_parameters, {}
    if kind == "last":
        names: list[str] = []
        for block in reversed(anatomy.blocks):
            if sum(anatomy.sizes[name] for name in names) < target:
                names += block.parameters
        return Selection.of(model, names)
    matrices = {n: tuple(v.shape) for n, v in model.named_parameters() if v.dim() == 2 and n not in anatomy.embeddings}
    ratio = target / sum(rows * columns for rows, columns in matrices.values())
    for name, (rows, columns) in matrices.items():
        choices = {"rows": rows, "columns": columns, "blocks": rows * columns // 64**2, "elements": rows * columns}[kind]
        index = torch.randperm(choices, generator=generator)[: max(1, round(ratio * choices))]
        parts[name] = Part((rows, columns), kind, index, 64 if kind == "blocks" else 1)  # type: ignore[arg-type]
    return Selection(parts)


def ours(root: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps in this process (one of several, perhaps) and return the seconds of each."""
    from selectune import catalogue, training
    from selectune.data import Encoder, pack
    from selectune.meter import Meter
    from selectune.models import load_base
    from selectune.models.builtin import BUILTIN
    from selectune.objectives.cross_entropy import CrossEntropy
    from selectune.parameters import Selection
    from selectune.recipe import TrainingRecipe
    from selectune.training import processes

    base, together = load_base(BUILTIN), processes.count()
    encoder = Encoder(base.tokenizer, LENGTH)
    rows = pack([piece for row in gsm8k(root, 0, 80) for piece in encoder.encode(as_record(row))], LENGTH,
                pad_id=base.tokenizer.pad_token_id)  # fmt: skip
    rows = rows[: cell.get("sequences", len(rows) // BATCH * BATCH)]
    if "part" in cell:
        selection = part_of(base.model, base.anatomy, cell["part"])
    elif "blocks" in cell:
        names = [name for block in base.anatomy.blocks[-cell["blocks"] :] for name in block.parameters]
        selection = Selection.of(base.model, names)
    else:
        selection = Selection.all(base.model)
    form: Any = catalogue.create("adapters", cell["form"])
    model = form.apply(base, selection, 0)
    clock = StepTimes()
    recipe = TrainingRecipe(batch_sequences=BATCH, micro_batch_sequences=cell.get("micro", BATCH // together), evaluations=0,
                            **cell.get("recipe", {}))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        made = training.Trainable(model, rows, [], CrossEntropy(), bfloat16=True, folder=Path(processes.agree(folder)), seed=0)
        training.train(made, recipe, steps=cell["steps"], learning_rate=1e-5, meter=Meter("train"), quiet=True, watching=[clock])
        processes.wait()
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    return {"seconds": clock.seconds, "trained": trained}


def peer(root: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps with TRL."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = trl_trainer(cell["peer"], gsm8k(root, 0, 80), Path(folder), 1e-5, cell["steps"], LENGTH, BATCH)
        trainer.train()
    return {"seconds": clock.seconds}


def run_cell(name: str, root: Path) -> dict[str, Any]:
    """Run one cell in a process of its own (or several) and return tokens per second and peak memory."""
    cell, count = CELLS[name], CELLS[name].get("processes", 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cores = psutil.cpu_count(logical=False) or 1
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(count):
            several = {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(max(1, cores // count))} if count > 1 else {}  # fmt: skip
            command = [sys.executable, "-m", "benchmarks.engine", "--cell", name, "--data-root", str(root),
                       "--output", f"{folder}/{rank}.json"]  # fmt: skip
            children.append(
                subprocess.Popen(command, env=os.environ | several, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            )
        errors = [child.communicate()[1] for child in children]
        if any(child.returncode for child in children):
            raise RuntimeError(errors[0].decode()[-2000:])
        found = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]
    seconds = statistics.median(found[0]["seconds"][cell.get("warm", WARM) :])
    return {"seconds_per_step": seconds, "tokens_per_second": LENGTH * BATCH / seconds, "trained": found[0].get("trained"),
            "peak_memory_bytes": sum(item["peak"] for item in found)}  # fmt: skip


def matrix_limit() -> float:
    """Return the floating-point operations per second of a large bf16 product."""
    left, right = (torch.randn(4096, 4096).bfloat16() for _ in range(2))
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - begin)
    return float(2 * 4096**3 / statistics.median(times[2:]))


def growth(root: Path) -> dict[str, list[tuple[int, float]]]:
    """Return seconds of a step by tokens in it and by number of trained blocks."""
    from selectune import catalogue
    from selectune.data import Encoder, pack, stack
    from selectune.models import load_base
    from selectune.models.builtin import BUILTIN
    from selectune.objectives.cross_entropy import CrossEntropy
    from selectune.parameters import Selection
    from selectune.training.allocator import keep_freed_memory
    from selectune.training.loss import LossOfModel

    keep_freed_memory()

    def seconds(form: str, blocks: int, sequences: int) -> float:
        base = load_base(BUILTIN)
        encoder = Encoder(base.tokenizer, LENGTH)
        rows = pack([piece for row in gsm8k(root, 0, 80) for piece in encoder.encode(as_record(row))], LENGTH)
        names = [name for block in base.anatomy.blocks[len(base.anatomy.blocks) - blocks :] for name in block.parameters]
        chosen: Any = catalogue.create("adapters", form)
        module = LossOfModel(chosen.apply(base, Selection.of(base.model, names), 0), CrossEntropy(), True)
        batch, times = stack(rows[:sequences]), []
        with module.attending(rows):
            for _ in range(4):
                begin = time.perf_counter()
                module(**batch).backward()
                module.zero_grad(set_to_none=False)
                times.append(time.perf_counter() - begin)
        return min(times[1:])

    return {
        "tokens": [(count * LENGTH, seconds("lora", 30, count)) for count in (1, 2, 3, 4, 6, 8)],
        "blocks": [(count, seconds("full", count, 2)) for count in (1, 6, 12, 18, 24, 30)],
    }


def refuse_a_busy_machine() -> None:
    """End with a plain word when another process keeps a core busy."""
    busy = psutil.cpu_percent(3.0)
    if busy > 15:
        sys.exit(f"other processes keep the machine {busy:.0f} % busy: times would mean nothing (--busy measures all the same)")


def main() -> None:
    """Measure all cells, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="cells, by name")
    parser.add_argument("--busy", action="store_true", help="measure although the machine is busy")
    parser.add_argument("--growth", action="store_true", help="only how a step grows with tokens and blocks")
    parser.add_argument("--cell", choices=list(CELLS), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS / "engine.json")
    arguments = parser.parse_args()
    if arguments.cell:
        cell = CELLS[arguments.cell]
        found = peer(arguments.data_root, cell) if "peer" in cell else ours(arguments.data_root, cell)
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        arguments.output.write_text(json.dumps(found), encoding="utf-8")
        return
    if not arguments.busy:
        refuse_a_busy_machine()
    kept: dict[str, Any] = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    kept["machine"] = {"cores": psutil.cpu_count(logical=False), "system": platform.machine(), "torch": torch.__version__}
    if arguments.growth:
        kept["growth"] = growth(arguments.data_root)
        arguments.output.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        return
    kept["matrix_flops_per_second"] = matrix_limit()
    names = [name for name in CELLS if not arguments.only or name in arguments.only]
    done = max((cell["round"] for cells in kept.get("cells", {}).values() for cell in cells), default=0)
    for number in range(done + 1, done + 1 + arguments.rounds):
        for name in names:
            found = run_cell(name, arguments.data_root) | {"round": number}
            kept.setdefault("cells", {}).setdefault(name, []).append(found)
            arguments.output.write_text(json.dumps(kept, indent=1), encoding="utf-8")
            print(
                f"{name:45s} {found['tokens_per_second']:8.0f} tokens/s {found['peak_memory_bytes'] / 2**30:6.2f} GiB", flush=True
            )


if __name__ == "__main__":
    main()
