"""Things that might make the engine faster, each tried by itself: what came of them is in ``results/engine_trials.json``.

    python -m benchmarks.engine_trials            # all of them
    python -m benchmarks.engine_trials rotary     # one

Weights in the matrix units' packed layout, layouts of the head, whole blocks through ``torch.compile``, the norm, the gated
unit and rotary positions written out against short forms. Milliseconds on an otherwise idle machine, the least of several.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from selectune.models import load_base
from selectune.models.builtin import BUILTIN
from selectune.models.norms import short_norms
from selectune.training.allocator import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
TOKENS = 1024


def least(work: Callable[[], Any], times: int = 12) -> float:
    """Return the least milliseconds of several calls."""
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        found.append((time.perf_counter() - begin) * 1e3)
    return round(min(found[2:]), 3)


def half(*shape: int, gradient: bool = False) -> Tensor:
    """Return random bf16 numbers."""
    return torch.randn(*shape).bfloat16().requires_grad_(gradient)


def packed_weights() -> dict[str, float]:
    """A frozen weight as it is, and reordered once for the matrix units."""
    states, weight = half(TOKENS, 576), half(1536, 576)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, TOKENS)
    with torch.no_grad():
        return {
            "plain": least(lambda: functional.linear(states, weight)),
            "packed": least(lambda: torch.ops.mkldnn._linear_pointwise(states, packed, None, "none", [], "")),
        }


def head_layouts() -> dict[str, float]:
    """The head's product forward and backward, with the embedding as it is and with a transposed copy."""
    states, weight = half(400, 576, gradient=True), half(49152, 576)
    turned, given = weight.t().contiguous(), half(400, 49152)

    def run(product: Callable[[], Tensor]) -> Callable[[], None]:
        def work() -> None:
            states.grad = None
            product().backward(given)

        return work

    return {
        "words first, as stored": least(run(lambda: functional.linear(states, weight)), 6),
        "channels first": least(run(lambda: states @ turned), 6),
        "words first, transposed copy for the way back": least(
            lambda: (functional.linear(states, weight), given @ turned.t()), 6
        ),
    }


def compiled_block() -> dict[str, float]:
    """One frozen block, forward and backward to its input."""
    base = load_base(BUILTIN)
    block: Any = base.model.model.layers[3]
    states = half(2, 512, 576, gradient=True)
    given, positions = half(2, 512, 576), torch.arange(512)[None].expand(2, -1)
    places = base.model.model.rotary_emb(states, positions)

    def run(forward: Any) -> Callable[[], None]:
        def work() -> None:
            states.grad = None
            found = forward(states, position_embeddings=places, attention_mask=None)
            (found[0] if isinstance(found, tuple) else found).backward(given)

        return work

    found = {"written out": least(run(block))}
    with short_norms(block):
        found["short norms"] = least(run(block))
    begin = time.perf_counter()
    compiled = torch.compile(block)
    try:
        run(compiled)()
        found["seconds to compile"] = round(time.perf_counter() - begin, 1)
        found["compiled"] = least(run(compiled))
    except Exception as error:  # no compiler on this machine, for instance
        found["compiled: " + type(error).__name__] = float("nan")
    return found


class _Gated(torch.autograd.Function):
    """``silu(gate) * up`` that keeps its two inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradients[0] * up, gate), functional.silu(gate).mul_(gradients[0])


def gated_unit() -> dict[str, float]:
    """The gated unit forward and backward, written out and with less kept."""
    gate, up, given = half(TOKENS, 1536, gradient=True), half(TOKENS, 1536, gradient=True), half(TOKENS, 1536)

    def run(product: Callable[[], Tensor]) -> Callable[[], None]:
        def work() -> None:
            gate.grad = up.grad = None
            product().backward(given)

        return work

    activation = nn.SiLU()
    return {
        "written out": least(run(lambda: activation(gate) * up)),
        "one node, silu computed again": least(run(lambda: _Gated.apply(gate, up))),  # type: ignore[no-untyped-call,arg-type]
    }


class _Turned(torch.autograd.Function):
    """Rotary positions as one node: two halves turned in four passes, without a turned copy; back by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(states, cosine, sine)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(gradients[0], cosine, -sine), None, None


def _turned(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return states turned by angles of which each half of a head has the same."""
    found, size = torch.empty_like(states), states.shape[-1] // 2
    first, second = states[..., :size], states[..., size:]
    torch.mul(first, cosine, out=found[..., :size]).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=found[..., size:]).addcmul_(first, sine)
    return found


def rotary() -> dict[str, float]:
    """Rotary positions of a block's queries, forward and backward, as transformers writes them and as one node."""
    from transformers.models.llama.modeling_llama import rotate_half

    states, given, angles = half(2, 9, 512, 64, gradient=True), half(2, 9, 512, 64), torch.randn(1, 1, 512, 32)
    cosine, sine = (torch.cat([part, part], -1).bfloat16() for part in (angles.cos(), angles.sin()))
    short = cosine[..., :32].contiguous(), sine[..., :32].contiguous()

    def run(turn: Callable[[], Tensor]) -> Callable[[], None]:
        def work() -> None:
            states.grad = None
            turn().backward(given)

        return work

    return {
        "written out": least(run(lambda: states * cosine + rotate_half(states) * sine)),
        "one node": least(run(lambda: _Turned.apply(states, *short))),  # type: ignore[no-untyped-call,arg-type]
    }


def main() -> None:
    """Try everything (or what is named) and write what came of it."""
    keep_freed_memory()
    trials = {trial.__name__: trial for trial in (packed_weights, head_layouts, gated_unit, compiled_block, rotary)}
    asked = sys.argv[1:] or list(trials)
    file = RESULTS / "engine_trials.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found = known | {name: trials[name]() for name in asked}
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
