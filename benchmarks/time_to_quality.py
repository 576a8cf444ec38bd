"""How long until a model is as good as the better of two peers becomes in one epoch?

The peers (TRL with LoRA, and TRL's full fine-tuning) train one epoch on 600 GSM8K records at four learning rates each; the lowest
development loss of the eight, with the forgetting that came with it, is the mark. Ours then trains until it reaches the mark.

    python benchmarks/time_to_quality.py peers --data-root ../shared/data      (about two hours; every cell is kept)
    python benchmarks/time_to_quality.py ours --data-root ../shared/data

Seconds are steps x seconds per step, the latter measured apart on an idle machine (``engine.py``), so that the quality
runs may share the machine with others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import Peer, as_record, gsm8k, trl_trainer
from selectune import catalogue, training
from selectune.data import Encoder, pack
from selectune.evaluation import measure_forgetting
from selectune.meter import Meter
from selectune.models import load_base
from selectune.models.builtin import BUILTIN
from selectune.models.head import SplitModel
from selectune.objectives.cross_entropy import CrossEntropy
from selectune.parameters import Selection
from selectune.recipe import TrainingRecipe
from selectune.training.allocator import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
RATES: dict[Peer, tuple[float, ...]] = {"full": (1e-4, 3e-4, 3e-5, 1e-3), "lora": (1e-3, 3e-3, 1e-2, 3e-4)}
TRAIN, DEV = 600, 100
PEERS = RESULTS / "time_to_quality_peers.json"


@torch.no_grad()
def dev_loss(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Return the mean negative log-likelihood of the response tokens, in nats."""
    encoder, split, objective = Encoder(tokenizer), SplitModel(model), CrossEntropy()
    packed = pack([piece for row in rows for piece in encoder.encode(as_record(row))], 512, pad_id=tokenizer.pad_token_id)
    total, count = 0.0, 0
    model.eval()
    for row in packed:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = split.hidden(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None])
            total += float(objective.total(split.logits, hidden, row["labels"][None]))
        count += int((row["labels"][1:] != -100).sum())
    return total / count


def quality(model: Any, root: Path) -> dict[str, float]:
    """Return a model's development loss and its forgetting."""
    base = load_base(BUILTIN)
    before, after = measure_forgetting(base.model, model, base.tokenizer, bfloat16=True)
    return {
        "dev_loss": dev_loss(model, base.tokenizer, gsm8k(root, TRAIN, DEV)),
        "forgetting": after[0].score - before[0].score,
        "kl": after[1].score,
    }


def peers(root: Path, file: Path) -> None:
    """Train every peer at every rate that is not in the file yet, each in a process of its own."""
    if not file.exists():
        base = load_base(BUILTIN)
        found = {"base": {"dev_loss": dev_loss(base.model, base.tokenizer, gsm8k(root, TRAIN, DEV))}}
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    for peer, rate in ((peer, RATES[peer][i]) for i in range(4) for peer in RATES):
        if f"{peer} {rate:g}" not in json.loads(file.read_text(encoding="utf-8")):
            subprocess.run([sys.executable, "-m", "benchmarks.time_to_quality", "peer", "--data-root", str(root), "--peer", peer,
                            "--rate", str(rate)], check=True)  # fmt: skip


def one_peer(peer: Peer, rate: float, root: Path, file: Path) -> None:
    """Train one peer for an epoch and write down what came of it."""
    keep_freed_memory()  # quicker, and changes no number; the peers' speed is measured without it
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = trl_trainer(peer, gsm8k(root, 0, TRAIN), Path(folder), rate)
        trainer.train()
    cells: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    cells[f"{peer} {rate:g}"] = {"steps": trainer.state.global_step, "seconds_while_busy": sum(clock.seconds),
                                 **quality(trainer.model, root)}  # fmt: skip
    file.write_text(json.dumps(cells, indent=1), encoding="utf-8")
    print(peer, rate, cells[f"{peer} {rate:g}"], flush=True)


OURS: dict[str, dict[str, Any]] = {
    "LoRA, one sequence a step": {"form": "lora", "rate": 3e-3, "batch": 1, "epochs": 1},
    "LoRA": {"form": "lora", "rate": 2e-3, "batch": 2, "epochs": 1.3, "evaluations": 6},
    "last 12 blocks": {"form": "full", "blocks": 12, "rate": 3e-4, "batch": 1, "epochs": 2, "cell": "12 of 30 blocks"},
    "full, one sequence a step": {"form": "full", "rate": 7e-5, "batch": 1, "epochs": 1, "cell": "full"},
}


def ours(name: str, root: Path, file: Path) -> None:
    """Train ours and write down the development loss as it falls."""
    cell = OURS[name]
    base = load_base(BUILTIN)
    torch.manual_seed(0)
    encoder = Encoder(base.tokenizer)

    def packed(first: int, count: int) -> list[dict[str, torch.Tensor]]:
        pieces = [piece for row in gsm8k(root, first, count) for piece in encoder.encode(as_record(row))]
        return pack(pieces, 512, pad_id=base.tokenizer.pad_token_id)

    rows = packed(0, TRAIN)
    names = [n for block in base.anatomy.blocks[-cell.get("blocks", 30) :] for n in block.parameters]
    selection = Selection.of(base.model, names) if "blocks" in cell else Selection.all(base.model)
    form: Any = catalogue.create("adapters", cell["form"])
    model = form.apply(base, selection, 0)
    recipe = TrainingRecipe(
        batch_sequences=cell["batch"], micro_batch_sequences=cell["batch"], evaluations=cell.get("evaluations", 8)
    )
    steps = round(cell["epochs"] * -(-len(rows) // cell["batch"]))
    with tempfile.TemporaryDirectory() as folder:
        made = training.Trainable(model, rows, packed(TRAIN, DEV), CrossEntropy(), bfloat16=True, folder=Path(folder), seed=0)
        training.train(made, recipe, steps=steps, learning_rate=cell["rate"], meter=Meter("train"), quiet=True)
        metrics = (made.folder / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in metrics.splitlines()]
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found[name] = {"cell": cell.get("cell", "LoRA"), "steps": steps, "tokens_per_step": 512 * cell["batch"],
                   "dev_loss": [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line],
                   "seconds_while_busy": lines[-1].get("seconds", lines[-2].get("seconds")), "end": quality(model, root)}  # fmt: skip
    file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(name, found[name], flush=True)


def main() -> None:
    """Run one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["peers", "peer", "ours"])
    parser.add_argument("--peer", choices=["lora", "full"])
    parser.add_argument("--rate", type=float)
    parser.add_argument("--cell", choices=list(OURS), nargs="*", default=list(OURS))
    parser.add_argument("--data-root", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.side == "peers":
        peers(arguments.data_root, PEERS)
    elif arguments.side == "peer":
        one_peer(arguments.peer, arguments.rate, arguments.data_root, PEERS)
    else:
        for name in arguments.cell:
            ours(name, arguments.data_root, RESULTS / "time_to_quality_ours.json")


if __name__ == "__main__":
    main()
