"""What others would use: TRL with PEFT's LoRA, and TRL's full fine-tuning, on the same records.

Knows: how the peers are set up, at their best on a CPU (bf16 autocast, no gradient checkpointing, records packed, loss on completions
only, fused AdamW). Does not know: what is compared. Needs ``pip install selectune[compare]``.
"""

from __future__ import annotations

import gzip
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from selectune.data.records import Message, Record
from selectune.models import locate
from selectune.models.builtin import BUILTIN

Peer = Literal["lora", "full"]


def gsm8k(root: Path, first: int, count: int) -> list[dict[str, str]]:
    """Return some of GSM8K's training records, in the order of the file."""
    with gzip.open(root / "gsm8k/train.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file][first : first + count]


def as_record(row: dict[str, str]) -> Record:
    """Return a question and its answer as one of our records."""
    return Record("chat", (Message("user", row["question"]), Message("assistant", row["answer"])))


@dataclass
class StepTimes(TrainerCallback):
    """Seconds of each optimiser step."""

    seconds: list[float] = field(default_factory=list)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begin)


def trl_trainer(
    peer: Peer, rows: list[dict[str, str]], folder: Path, learning_rate: float, steps: int = -1, length: int = 512, batch: int = 2
) -> tuple[Any, StepTimes]:
    """Return a TRL trainer that is ready to train, and its clock.

    Args:
        rows: with ``question`` and ``answer``. steps: optimiser steps; -1 for one epoch. length: of a packed sequence.
        batch: sequences in a step.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    source = locate(BUILTIN)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32 if peer == "full" else torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    turns = [
        {"prompt": [{"role": "user", "content": r["question"]}], "completion": [{"role": "assistant", "content": r["answer"]}]}
        for r in rows
    ]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if peer == "lora" else None
    clock = StepTimes()
    config = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=batch, max_length=length, packing=True, completion_only_loss=True,
        gradient_checkpointing=False, bf16=True, use_cpu=True, learning_rate=learning_rate, lr_scheduler_type="cosine",
        warmup_steps=0.05, num_train_epochs=1, max_steps=steps, logging_steps=10, save_strategy="no", report_to="none", seed=0,
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(turns), processing_class=tokenizer, peft_config=lora,
        callbacks=[clock],
    )  # fmt: skip
    return trainer, clock
