"""QLoRA: LoRA on a base whose linear layers are held in 4 bits (NF4, double quantisation)."""

from __future__ import annotations

from typing import ClassVar

from selectune.adapters.lora import LoRA


class QLoRA(LoRA):
    """LoRA beside 4-bit linear layers; bitsandbytes computes with them, on a CPU too."""

    name: ClassVar[str] = "qlora"
    paper: ClassVar[str] = "QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS 2023, arXiv 2305.14314"
    summary: ClassVar[str] = "LoRA on a base held in 4 bits (NF4)."
    departs: ClassVar[str] = "No paged optimiser: the states of a small model's adapters fit in memory."
    needs_quantised_base: ClassVar[bool] = True
