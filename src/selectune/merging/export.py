"""Writes a specialist as an ordinary model, and checks that it is the same model.

Knows: merging an adapter (in fp32, rounded once), the folder that plain transformers loads, the GGUF file; the comparison of
logits with the trained model, and when a difference is too large. Does not know: how the specialist was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selectune.errors import UserError
from selectune.run import Run, folder_atomically

if TYPE_CHECKING:
    from selectune.models import Base

TEXTS = (
    "The river runs past the mill and under the old bridge.",
    "Question: What is 12 plus 30?\nAnswer: 42",
    "def add(a, b):\n    return a + b",
    "Dear friend, thank you for the letter and the photographs.",
)
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1.0, torch.float16: 0.25}
"""Largest difference of a logit, in fp32 arithmetic. In fp32 only the order of additions differs. Rounding merged weights to 8 bits
of mantissa moves logits of a range of about 30 by some tenths (measured: see docs/decisions.md); beyond this, something is wrong."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What was written, and how equal it is."""

    path: Path
    size: int
    dtype: str
    difference: float
    tolerance: float


def export_run(run: Run, target: Path, gguf: bool = False, dtype: str = "auto") -> Exported:
    """Write a run's specialist as a transformers folder or a GGUF file.

    Raises:
        UserError: the target exists, the dtype or architecture is not supported, or the logits differ too much (nothing is left).
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"unknown dtype '{dtype}'", field="--dtype", expected=f"auto, {', '.join(DTYPES)}")
    if not run.finished("train"):
        raise UserError("is not trained yet", file=run.folder, mend=f"selectune resume {run.folder}")
    file = target if target.suffix == ".gguf" else target / f"{run.name}.gguf" if gguf else None
    if (file or target).exists():
        raise UserError("is there already", file=file or target, mend="name another folder")
    from selectune.models import load_base

    merged, tokenizer, own = merge(run)
    reference = _logits(merged, tokenizer)
    wanted = own if dtype == "auto" else DTYPES[dtype]
    merged = merged.to(wanted)
    if file is None:
        with folder_atomically(target) as folder:
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            difference = _compare(load_base(folder, dtype=torch.float32), reference)
            _refuse(difference, TOLERANCES[wanted], target)
        return Exported(target, _size(target), str(wanted).removeprefix("torch."), difference, TOLERANCES[wanted])
    from selectune.merging.gguf_file import write_gguf

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}")
    try:
        write_gguf(merged, tokenizer, partial, wanted, run.name)
        difference = _compare(_read_gguf(partial, merged.device), reference)
        _refuse(difference, TOLERANCES[wanted], file)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)
    return Exported(file, file.stat().st_size, str(wanted).removeprefix("torch."), difference, TOLERANCES[wanted])


def merge(run: Run) -> tuple[Any, Any, torch.dtype]:
    """Return the specialist as one fp32 model without adapters, its tokenizer, and the dtype of its base.

    A QLoRA adapter is merged into the base's own weights, not into their 4-bit copies.
    """
    from selectune.models import load_base

    recipe = run.recipe
    base = load_base(recipe.base, dtype=torch.float32, trust_remote_code=recipe.trust_remote_code)
    return merged(base, run.path("specialist")), base.tokenizer, base.dtype


def merged(base: Base, folder: Path) -> Any:
    """Put a saved specialist onto its fp32 base, which it changes, and return it as a plain model."""
    from selectune.adapters import load_specialist

    model = load_specialist(base, folder)
    return (model.merge_and_unload() if hasattr(model, "merge_and_unload") else model).eval()


@torch.no_grad()
def _logits(model: Any, tokenizer: Any) -> list[Tensor]:
    batches = [tokenizer(text, return_tensors="pt").to(model.device) for text in TEXTS]
    return [model(**batch, use_cache=False).logits.float() for batch in batches]


def _compare(base: Any, reference: list[Tensor]) -> float:
    """Return the largest difference of a logit between a written model and the trained one."""
    found = _logits(base.model, base.tokenizer)
    if any(ours.shape != theirs.shape for ours, theirs in zip(found, reference, strict=True)):
        return float("inf")  # the tokenizer or the vocabulary changed
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(found, reference, strict=True))


def _read_gguf(file: Path, device: torch.device) -> Any:
    from types import SimpleNamespace

    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return SimpleNamespace(model=model.to(device).eval(), tokenizer=tokenizer)


def _refuse(difference: float, tolerance: float, target: Path) -> None:
    if difference > tolerance:
        raise UserError(
            f"the exported model is not the trained one: a logit differs by {difference:.3g}", file=target,
            expected=f"at most {tolerance:g}", mend="export with --dtype float32, or report this as a defect",
        )  # fmt: skip


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
