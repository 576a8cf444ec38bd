"""How far has a specialist drifted from its base on what has nothing to do with the target?

Knows: three measures, on built-in general text and prompts: the rise of mean token cross-entropy (forgetting, as in PEFT's
method comparison), the KL divergence from the base on the responses to general prompts, and the share of positions where both
would say the same token. Does not know: which drift is too much.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from selectune.data.chat import Encoded, Encoder
from selectune.data.records import Message, Record
from selectune.evaluation.scorer import Scorer
from selectune.models.head import SplitModel
from selectune.run import Benchmark, Item


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
    for model, results in ((base_model, before), (specialist_model, after)):
        if results:
            continue
        losses = Scorer(model, tokenizer, bfloat16=bfloat16).token_nll(texts)
        items = [
            Item(id=passage.id, value=sum(loss) / len(loss), prompt=passage.text[:200])
            for passage, loss in zip(passages, losses, strict=True)
        ]
        results.append(_benchmark("cross_entropy", False, items))
    encoder = Encoder(tokenizer, max_length=1024)
    divergences, agreements, perfect, zero = [], [], [], []
    conversations = [(Message("user", prompt.prompt), Message("assistant", prompt.response)) for prompt in prompts]
    pieces = [encoder.encode(Record("chat", messages))[0] for messages in conversations]
    compared = [pair for row in _rows(pieces) for pair in _compare(base_model, specialist_model, row, bfloat16)]
    for prompt, (divergence, agreement) in zip(prompts, compared, strict=True):
        shown = {"id": prompt.id, "prompt": prompt.prompt[:200]}
        divergences.append(Item(value=divergence, **shown))
        agreements.append(Item(value=agreement, **shown))
        zero.append(Item(value=0.0, **shown))
        perfect.append(Item(value=1.0, **shown))
    before += [_benchmark("kl", False, zero), _benchmark("top1_agreement", True, perfect)]
    after += [_benchmark("kl", False, divergences), _benchmark("top1_agreement", True, agreements)]
    return before, after


def _rows(pieces: list[Encoded], limit: int = 512) -> Iterator[list[Encoded]]:
    """Yield conversations in order, as many at a time as fit into so many tokens."""
    row: list[Encoded] = []
    for piece in pieces:
        if row and sum(len(one.input_ids) for one in row) + len(piece.input_ids) > limit:
            yield row
            row = []
        row.append(piece)
    if row:
        yield row


@torch.no_grad()
def _compare(base: Any, specialist: Any, row: list[Encoded], bfloat16: bool) -> list[tuple[float, float]]:
    """Return mean KL(base || specialist) and top-1 agreement over the response positions of each conversation of a row."""
    device = next(base.parameters()).device
    ids = torch.tensor([token for piece in row for token in piece.input_ids], device=device)
    places = torch.cat([torch.arange(len(piece.input_ids), device=device) for piece in row])  # restarted: none sees another
    learnt = torch.tensor([label != -100 for piece in row for label in [*piece.labels[1:], -100]], device=device)
    owners = torch.tensor([number for number, piece in enumerate(row) for _ in piece.input_ids], device=device)[learnt]
    found = []
    for model in (base, specialist):
        split = SplitModel(model)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            hidden = split.hidden(input_ids=ids[None], position_ids=places[None])
            found.append(split.logits(hidden[0, learnt]).float().log_softmax(-1))
    ours, theirs = found
    divergence = (ours.exp() * (ours - theirs)).sum(-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).float()
    return [
        (max(float(divergence[owners == number].mean()), 0.0), float(same[owners == number].mean())) for number in range(len(row))
    ]


def _benchmark(measure: str, higher: bool, items: list[Item]) -> Benchmark:
    return Benchmark(name=f"forgetting/{measure}", role="forgetting", metric=measure, higher_is_better=higher, items=items,
                     score=sum(item.value for item in items) / len(items), settings={"from": "built in"})  # fmt: skip
