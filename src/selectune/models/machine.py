"""What this machine is and can do.

Knows: versions, cores, memory, where models compute, whether bf16 products are faster than fp32 ones, whether NF4 works here.
Does not know: any model, but for whether the built-in one is in the cache.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "selectune",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "lm_eval",
    "bitsandbytes",
    "gguf",
)


@dataclass(frozen=True)
class Check:
    """One thing that the doctor looked at."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def environment() -> dict[str, Any]:
    """Return versions and the machine, for the run folder."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "packages": {name: _version(name) for name in PACKAGES},
    }


@cache
def accelerator() -> torch.device:
    """Return where models compute: on a GPU (of several processes each has its own), or on the CPU where none is visible."""
    import torch

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


@cache
def bf16_is_fast() -> bool:
    """Whether a bf16 matrix product beats an fp32 one here (measured once, a fifth of a second)."""
    import torch

    if accelerator().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _product_speed(torch.bfloat16) > 1.2 * _product_speed(torch.float32)


def _product_speed(dtype: Any, seconds: float = 0.05) -> float:
    """Return floating-point operations per second of a large product of matrices, or of a small one where a large one takes long."""
    import torch

    speed = 0.0
    for side in (256, 1024):
        matrix = torch.ones(side, side, dtype=dtype)
        matrix @ matrix
        begin, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - begin) < seconds:
            matrix @ matrix
            count += 1
        speed = 2 * side**3 * count / passed
        if 2 * 1024**3 / speed > 1.0:
            break
    return speed


def doctor() -> list[Check]:
    """Look at everything that a run needs."""
    import torch

    from selectune.models.builtin import BUILTIN, GGUF_SHA256, cache_folder

    memory = psutil.virtual_memory()
    fast, slow = _product_speed(torch.bfloat16, 0.3), _product_speed(torch.float32, 0.3)
    folder = cache_folder()
    space = shutil.disk_usage(next(p for p in [folder, *folder.parents] if p.exists())).free
    converted = (folder / "bases" / GGUF_SHA256[:16] / "config.json").exists()
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none (training runs on the CPU)"
    return [
        Check("python", True, platform.python_version()),
        Check("torch", True, torch.__version__),
        Check("processor", True, f"{_processor()}, {os.cpu_count()} cores"),
        Check("accelerator", True, device),
        Check("memory", memory.available > 3 * 2**30, f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
              "the built-in base trains in about 3 GiB; close something, or lower training.micro_batch_sequences"),
        Check("disk", space > 2 * 2**30, f"{space / 2**30:.0f} GiB free for the cache ({folder})", "free 2 GiB, or set SELECTUNE_CACHE"),
        Check("matrix products", True, f"bf16 {fast / 1e9:.0f}, fp32 {slow / 1e9:.0f} GFLOP/s: "
              f"{'bf16' if fast > 1.2 * slow else 'fp32'} is used"),
        Check("4-bit base (QLoRA)", *_nf4_works()),
        Check("built-in base", True, f"{BUILTIN}: {'in the cache' if converted else 'fetched at first use (93 MB)'}"),
    ]  # fmt: skip


def _nf4_works() -> tuple[bool, str, str]:
    import torch

    try:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(torch.ones(64, 64), quant_type="nf4")
        functional.dequantize_4bit(packed, state)
    except (ImportError, RuntimeError, AttributeError) as error:
        return False, f"does not work here ({str(error).splitlines()[0][:80]})", "pip install -U bitsandbytes"
    return True, "works", ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
