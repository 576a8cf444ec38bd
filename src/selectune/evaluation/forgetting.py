"""How far has a specialist drifted from its base on what has nothing to do with the target?

Knows: three measures, on built-in general text and prompts: the rise of mean token cross-entropy (forgetting, as in PEFT's
method comparison), the KL divergence from the base on the responses to general prompts, and the share of positions where both
would say the same token. Does not know: which drift is too much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selectune.data.chat import Encoder
from selectune.data.records import Message, Record
from selectune.evaluation.rows import Pair
from selectune.evaluation.scorer import Scorer
from selectune.run import Benchmark, Item

POSITIONS = 256
"""Positions whose distributions over the vocabulary are held at once."""


def measure_forgetting(
    base_model: Any, specialist_model: Any, tokenizer: Any, bfloat16: bool = False, known: list[Benchmark] | None = None
) -> tuple[list[Benchmark], list[Benchmark]]:
    """Return the drift's benchmarks for the base (before) and for the specialist (after), on the same items.

    ``forgetting/cross_entropy``: nats per token, per passage. ``forgetting/kl``: KL(base || specialist), nats per response
    token, per prompt. ``forgetting/top1_agreement``: share of response positions with the same most likely token.

    Args:
        known: the base's benchmarks from an earlier measurement, whose cross-entropy need not be read again.
    """
    from selectune.evaluation.probe import load_general_prompts, load_general_text

    passages, prompts = load_general_text(), load_general_prompts()
    texts = [tokenizer(passage.text)["input_ids"] for passage in passages]
    before = [item for item in known or [] if item.metric == "cross_entropy"]
    after: list[Benchmark] = []
    base, specialist = (Scorer(model, tokenizer, bfloat16=bfloat16) for model in (base_model, specialist_model))
    for scorer, results in ((base, before), (specialist, after)):
        if results:
            continue
        items = [
            Item(id=passage.id, value=sum(loss) / len(loss), prompt=passage.text[:200])
            for passage, loss in zip(passages, scorer.token_nll(texts), strict=True)
        ]
        results.append(_benchmark("cross_entropy", False, items))
    encoder = Encoder(tokenizer, max_length=1024)
    divergences, agreements, perfect, zero = [], [], [], []
    responses = [_response(encoder, prompt.prompt, prompt.response) for prompt in prompts]
    for prompt, (divergence, agreement) in zip(prompts, compare(base, specialist, responses), strict=True):
        shown = {"id": prompt.id, "prompt": prompt.prompt[:200]}
        divergences.append(Item(value=divergence, **shown))
        agreements.append(Item(value=agreement, **shown))
        zero.append(Item(value=0.0, **shown))
        perfect.append(Item(value=1.0, **shown))
    before += [_benchmark("kl", False, zero), _benchmark("top1_agreement", True, perfect)]
    after += [_benchmark("kl", False, divergences), _benchmark("top1_agreement", True, agreements)]
    return before, after


def _response(encoder: Encoder, prompt: str, response: str) -> Pair:
    """Return the tokens of a prompt, and those of the response that a training would learn."""
    (piece,) = encoder.encode(Record("chat", (Message("user", prompt), Message("assistant", response))))
    learnt = [place for place, label in enumerate(piece.labels) if label != -100]
    return piece.input_ids[: learnt[0]], piece.input_ids[learnt[0] : learnt[-1] + 1]


def compare(base: Scorer, specialist: Scorer, responses: Sequence[Pair]) -> list[tuple[float, float]]:
    """Return mean KL(base || specialist), in nats, and top-1 agreement over the positions of each response.

    Args:
        responses: pairs of the tokens before a response and its own.
    """
    ours, theirs = base.states(responses), specialist.states(responses)
    found = [
        _differences(base.log_probabilities(left), specialist.log_probabilities(right))
        for left, right in zip(torch.cat(ours).split(POSITIONS), torch.cat(theirs).split(POSITIONS), strict=True)
    ]
    divergences, same = (torch.cat(parts).split([len(states) for states in ours]) for parts in zip(*found, strict=True))
    return [(max(float(one.mean()), 0.0), float(other.mean())) for one, other in zip(divergences, same, strict=True)]


def _differences(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    same = (ours.argmax(-1) == theirs.argmax(-1)).float()
    return (ours.exp() * (ours - theirs)).sum(-1), same


def _benchmark(measure: str, higher: bool, items: list[Item]) -> Benchmark:
    return Benchmark(name=f"forgetting/{measure}", role="forgetting", metric=measure, higher_is_better=higher, items=items,
                     score=sum(item.value for item in items) / len(items), settings={"from": "built in"})  # fmt: skip
