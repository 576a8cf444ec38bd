"""Keeps freed memory inside the process.

Knows: one setting of the C library's allocator. A training step frees and asks again for the same hundred megabytes; by
default glibc gives them back to the system each time and every page is faulted in anew. Measured on two cores
(SmolLM2-135M, 2 x 512 tokens): 363 -> 464 tokens/s for LoRA, 266 -> 378 for full fine-tuning.
Does not know: any other C library; elsewhere it does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Ask glibc to keep what is freed; return whether it could."""
    try:
        library = ctypes.CDLL(None)
        kept = library.mallopt(M_MMAP_THRESHOLD, 1 << 30) and library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    except (OSError, AttributeError, TypeError):
        return False
    return bool(kept)


def give_back_freed_memory() -> None:
    """Ask glibc to return to the system what was freed so far: pieces between which later, larger tensors would not fit."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
