"""How much do a few records, shown as demonstrations, help to answer others, and which of them was attended to? (Data Whisperer)

Knows: a conversation of demonstrations and a question with exact boundaries, the attention of one layer, and how an answer's worth is shared among
the demonstrations before it. Does not know: how answers are generated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from selectune.data.chat import Encoded, Encoder
from selectune.data.records import Message, Record
from selectune.errors import UserError
from selectune.examples.factors.shown import turns_of
from selectune.examples.method import Array, Ranked
from selectune.examples.pool import Pool
from selectune.models.anatomy import context_length
from selectune.progress import watched

TOGETHER = 64
"""Prompts whose answers are asked for at once."""


@dataclass(frozen=True)
class Shown:
    """Demonstrations and a question, as tokens."""

    piece: Encoded
    """Labels are the question's answer alone."""
    bounds: list[int]
    """Where the first demonstration begins and where each ends; the question follows the last."""
    answer: int
    """Where the answer begins."""


def shown(encoder: Encoder, demonstrations: list[Record], asked: Record) -> Shown | None:
    """Return demonstrations and a question as turns of one conversation, or None where the answer has no tokens or does not fit.

    What a template puts before the first words (the first token draws much attention to itself) belongs to no demonstration.
    """
    told = [turns_of(record) for record in demonstrations]
    whole = encoder.encode(_chat([*told, turns_of(asked)]))
    pieces = [encoder.encode(_chat(told[: number + 1])) for number in range(len(told))]
    other = encoder.encode(_chat([(Message("user", _unlike(told[0][0].content)), *told[0][1:])]))
    if not whole or not all(pieces) or not other:
        return None
    ids = whole[0].input_ids
    same = takewhile(lambda pair: pair[0] == pair[1], zip(pieces[0][0].input_ids, other[0].input_ids, strict=False))
    bounds = [len(list(same)), *(len(piece[0].input_ids) for piece in pieces)]
    labels = [-100] * bounds[-1] + whole[0].labels[bounds[-1] :]
    places = [place for place, label in enumerate(labels) if label != -100]
    if len(ids) >= encoder.max_length or not places or ids[: bounds[-1]] != pieces[-1][0].input_ids:
        return None
    return Shown(Encoded(ids, labels), bounds, places[0])


def _chat(turns: list[tuple[Message, ...]]) -> Record:
    return Record("chat", tuple(message for some in turns for message in some))


def _unlike(text: str) -> str:
    return ("B" if text.startswith("A") else "A") + text


@contextmanager
def attention_kept(base: Any, layer: int) -> Iterator[list[Tensor]]:
    """Within, the base attends in the plain way, and a list holds the attention of one layer in the last pass, ``(batch, heads, length, length)``."""
    model = base.model
    block = model.get_submodule(base.anatomy.blocks[layer].prefix)
    attention = next(module for name, module in block.named_children() if "att" in name and "norm" not in name)
    before, kept = model.config._attn_implementation, list[Tensor]()
    model.set_attn_implementation("eager")

    def keep(module: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        if output[1] is None:
            raise UserError("this base does not tell its attention", field="base", expected="a base with plain attention")
        kept[:] = [output[1].detach()]

    handle = attention.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()
        model.set_attn_implementation(before)


def shares(attention: Tensor, bounds: list[int], answer: int) -> Array:
    """Return each demonstration's share of the question's attention: mean over tokens of both, summed over heads, adding up to 1.

    Args:
        attention: ``(heads, length, length)``, rows attend. bounds, answer: see :class:`Shown`.
    """
    rows = attention[:, bounds[-1] : answer].float().sum((0, 1)).cpu()
    means = np.array([float(rows[start:end].mean()) if end > start else 0.0 for start, end in pairwise(bounds)])
    return means / means.sum() if means.sum() > 0 else np.full(len(means), 1 / max(len(means), 1))


def overlap(said: str, wanted: str) -> float:
    """Return the F-measure of the longest common subsequence of words (ROUGE-L, Lin 2004)."""
    left, right = said.lower().split(), wanted.lower().split()
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for place, other in enumerate(right, 1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return 2 * row[-1] / (len(left) + len(right)) if row[-1] else 0.0


class Whispered(Ranked):
    """The records that, shown as demonstrations, the base attends to when it answers well."""

    name: ClassVar[str] = "data_whisperer"
    family: ClassVar[str] = "target"
    paper: ClassVar[str] = (
        "Data Whisperer: Efficient Data Selection for Task-Specific LLM Fine-Tuning via Few-Shot In-Context Learning, ACL 2025, arXiv 2505.12212"
    )
    summary: ClassVar[str] = "The highest worth of answers after the record as a demonstration, shared by attention."
    departs: ClassVar[str] = (
        "Each question is asked by itself after the demonstrations, all as turns of one conversation; answers are worth the likelihood of the right "
        "one unless generated ones are asked for (small models hardly answer several questions at once)."
    )

    worth: Literal["likelihood", "exact", "overlap"] = "likelihood"
    """Of an answer: the right one's probability a token; or generated, whether it is the right one, or ROUGE-L with it."""
    demonstrations: Annotated[int, Field(gt=0)] = 3
    """Shown together (the paper: 5 to 10)."""
    questions: Annotated[int, Field(gt=0)] = 2
    """Asked after the same demonstrations (the paper: 3 to 8)."""
    rounds: Annotated[int, Field(gt=0)] = 1
    """Times that every record is shown, each time among others."""
    layer: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Whose attention counts, as a share of the depth."""
    longest: Annotated[int, Field(gt=0)] = 1024
    """Tokens of demonstrations and question; records that do not fit are worth 0."""
    new_tokens: Annotated[int, Field(gt=0)] = 64
    """Of a generated answer."""

    def score(self, pool: Pool) -> dict[str, Array]:
        each = {pool.keys[place]: pool.records[place] for place in pool.order}
        limit = min(self.longest, context_length(pool.base.model))
        encoder = replace(pool.encoder, max_length=limit)
        total, times = dict.fromkeys(each, 0.0), dict.fromkeys(each, 0)
        prompts = list(self._prompts(pool, encoder, _told(list(each.values())), _told(list(pool.target))))
        if not prompts:
            raise UserError(f"no question fits behind demonstrations in a prompt of {limit:,} tokens", field="examples.longest",
                            expected=f"two different questions or more whose records have at most {limit // 4:,} tokens")  # fmt: skip
        for start in watched(range(0, len(prompts), TOGETHER), "demonstrations", pool.quiet):
            pairs = prompts[start : start + TOGETHER]
            read = [(batch, asked, found) for batch, asked in pairs if (found := shown(encoder, batch, asked)) is not None]
            worths = self._worths(pool, [(batch, asked) for batch, asked, _ in read])
            layer = round(self.layer * (len(pool.base.anatomy.blocks) - 1))
            with attention_kept(pool.base, layer) as kept, torch.no_grad():
                for (batch, _, found), worth in zip(read, worths, strict=True):
                    likelihood = self._read(pool, found.piece)
                    full = len(batch) / self.demonstrations  # of few together none is worth more for it
                    for record, share in zip(batch, shares(kept[0][0], found.bounds, found.answer), strict=True):
                        total[record.key] += (likelihood if worth is None else worth) * full * float(share)
                        times[record.key] += 1
        silent = sum(not times[key] for key in pool.keys)
        if silent:
            pool.notes.append(f"{silent:,} records are shown in no prompt of {limit:,} tokens and are worth 0")
        return {"worth as a demonstration": np.array([total[key] / max(times[key], 1) for key in pool.keys])}

    def _prompts(
        self, pool: Pool, encoder: Encoder, records: list[Record], target: list[Record]
    ) -> Iterator[tuple[list[Record], Record]]:
        """Demonstrations and a question of each prompt: questions are the target's, or those of the other half of the pool."""
        sizes = {record.key: len(pieces[0].input_ids) for record in [*records, *target] if (pieces := encoder.encode(record))}
        targeted, asked_for, longest = bool(target), target or records, encoder.max_length // 4
        if lost := sum(sizes.get(record.key, encoder.max_length) > longest for record in asked_for):
            pool.notes.append(f"{lost:,} of {len(asked_for):,} questions are not asked: more than {longest:,} tokens")
        records, target = ([record for record in some if record.key in sizes] for some in (records, target))
        generator = pool.generator("data_whisperer")
        for _ in range(self.rounds):
            mixed = [records[place] for place in generator.permutation(len(records))]
            halves = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
            for told, asked in [(mixed, target)] if targeted else [halves, halves[::-1]]:
                short = [record for record in asked if sizes[record.key] <= longest]
                place = int(generator.integers(len(short))) if short else 0
                for batch in _batches(told, sizes, self.demonstrations, encoder.max_length * 3 // 4):
                    for _ in range(min(self.questions, len(short))):
                        yield batch, short[place % len(short)]
                        place += 1

    def _worths(self, pool: Pool, made: list[tuple[list[Record], Record]]) -> list[float | None]:
        """What generated answers are worth; None where the right one's likelihood counts."""
        if self.worth == "likelihood":
            return [None] * len(made)
        from selectune.evaluation.target import answers_match
        from selectune.inference.responder import LocalResponder, kept_in

        prompts = [_chat([*(turns_of(record) for record in batch), turns_of(asked)]).prompt for batch, asked in made]
        answers = LocalResponder(pool.base, pool.encoder, pool.meter, kept_in(pool), True, pool.rehearsal).answers(
            prompts, max_new_tokens=self.new_tokens
        )
        judge = answers_match if self.worth == "exact" else overlap
        return [float(judge(said[0], asked.response)) for said, (_, asked) in zip(answers, made, strict=True)]

    @staticmethod
    def _read(pool: Pool, piece: Encoded) -> float:
        """Read a prompt and its right answer; return the answer's probability a token (the geometric mean)."""
        model = pool.base.model
        device = model.get_input_embeddings().weight.device
        with torch.autocast(device.type, torch.bfloat16, enabled=pool.bfloat16):
            logits = model(input_ids=torch.tensor([piece.input_ids], device=device), use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(piece.labels[1:], device=device))
        pool.meter.count(forward=len(piece.input_ids))
        return math.exp(-float(loss))


def _told(records: list[Record]) -> list[Record]:
    """The records that begin with a question."""
    return [record for record in records if (turns := turns_of(record)) and turns[0].role == "user"]


def _batches(records: list[Record], sizes: dict[str, int], most: int, tokens: int) -> Iterator[list[Record]]:
    """Consecutive records, at most so many and so many tokens together; larger ones are left out."""
    batch: list[Record] = []
    for record in records:
        if sizes[record.key] > tokens:
            continue
        if len(batch) == most or sum(sizes[one.key] for one in [*batch, record]) > tokens:
            yield batch
            batch = []
        batch.append(record)
    if batch:
        yield batch
