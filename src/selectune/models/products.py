"""Products of fp32 matrices by the library that is faster on this processor.

Knows: torch's two libraries for them, MKL and oneDNN, and how to ask for either. On processors that are not Intel's, MKL's fp32
products run at less than half of oneDNN's speed (Zen 5, one core: 100 against 220 GFLOP/s). oneDNN is only reached through a
setting that allows it to round to bf16, which it does on some processors: it is used where its products prove to be fp32 ones.
Does not know: models.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

SHAPES = ((1, 64, 64), (3, 576, 1536), (16, 1536, 576), (256, 512, 512), (1024, 576, 192))
"""Rows, inner and outer sizes of the products that must be exact."""


@contextmanager
def fast_fp32_products() -> Iterator[None]:
    """Within, fp32 products are as exact as ever, and as fast as this machine can make them."""
    setting = _setting()
    if setting is None or not _onednn_is_exact_and_faster():
        yield
        return
    own = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = own


def _setting() -> Any:
    """Return torch's setting of oneDNN's fp32 products, where this torch has it."""
    found = getattr(torch.backends.mkldnn, "matmul", None)
    return found if torch.backends.mkldnn.is_available() and hasattr(found, "fp32_precision") else None


@cache
def _onednn_is_exact_and_faster() -> bool:
    """Try both libraries (once, less than a tenth of a second)."""
    setting, generator = _setting(), torch.Generator().manual_seed(0)
    own = setting.fp32_precision
    try:
        for rows, inner, outer in SHAPES:
            left, right = (torch.randn(shape, generator=generator) for shape in ((rows, inner), (outer, inner)))
            setting.fp32_precision = "bf16"
            exact = left.double() @ right.double().T
            if (left @ right.T - exact).norm() > 2e-6 * exact.norm():
                return False
            batch = torch.bmm(left[None], right[None].transpose(1, 2))[0]
            if (batch - exact).norm() > 2e-6 * exact.norm():
                return False
        left, right = torch.ones(256, 512), torch.ones(1024, 512)
        seconds = {}
        for name in ("bf16", "ieee"):
            setting.fp32_precision = name
            seconds[name] = min(_seconds(left, right) for _ in range(8))
        return seconds["bf16"] < 0.8 * seconds["ieee"]
    except RuntimeError:  # a processor or a torch that refuses the setting
        return False
    finally:
        setting.fp32_precision = own


def _seconds(left: Tensor, right: Tensor) -> float:
    begin = time.perf_counter()
    left @ right.T
    return time.perf_counter() - begin
