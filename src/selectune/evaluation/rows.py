"""How questions become the rows of a forward pass.

Knows: contexts that are asked several continuations, beginnings that many contexts share, and three ways of laying questions
out: end to end in one row without padding; side by side, a question a row, under a dense mask; and plainly, a continuation a
row, as any causal model takes it. In all of them the last token of a continuation is predicted and never read.
Does not know: models, and what the scores decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

Pair = tuple[Sequence[int], Sequence[int]]
Item = TypeVar("Item")

SHORTEST_PREFIX = 16
"""Tokens that a shared beginning must have."""
LEAST_SAVED = 256
"""Tokens that must not be computed again and again before a shared beginning gets a forward pass of its own."""


@dataclass
class Question:
    """A context and what is asked of it. ``shared``: how many of the context's tokens stand in the prefix of its batch."""

    context: list[int]
    continuations: dict[int, list[int]]
    """By number of the pair; not empty."""
    shared: int = 0

    @property
    def read(self) -> int:
        """Tokens that a forward pass reads."""
        return len(self.context) - self.shared + sum(len(tokens) - 1 for tokens in self.continuations.values())

    @property
    def reach(self) -> int:
        """The largest number of tokens that one token sees, itself included."""
        return len(self.context) + max(map(len, self.continuations.values())) - 1


@dataclass
class Batch:
    """One forward pass and what is read off it.

    Hidden states ``(rows x width, hidden)`` are picked at ``places``; prediction ``k`` is of ``targets[k]``, at the state
    ``which[k]`` of those picked, and belongs to the pair ``owners[k]``.
    """

    ids: Tensor
    positions: Tensor
    places: list[int] = field(default_factory=list)
    which: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    parts: list[list[int]] = field(default_factory=list)
    """End to end: for each question the lengths of its context and its continuations."""
    mask: Tensor | None = None
    """Side by side: ``(rows, query, key)``, True where seen; None where causal attention is enough."""

    def ask(self, question: Question, begin: int) -> None:
        """Note what is predicted for a question whose tokens begin at a place."""
        end_of_context = begin + len(question.context) - question.shared - 1
        here, place = len(self.places), end_of_context
        self.places.append(place)
        for index, continuation in question.continuations.items():
            self.which += [here, *range(len(self.places), len(self.places) + len(continuation) - 1)]
            self.places += range(place + 1, place + len(continuation))
            self.targets += continuation
            self.owners += [index] * len(continuation)
            place += len(continuation) - 1


def questions_of(pairs: dict[int, Pair]) -> list[Question]:
    """Gather the continuations of the same context."""
    found: dict[tuple[int, ...], Question] = {}
    for index, (context, continuation) in pairs.items():
        found.setdefault(tuple(context), Question(list(context), {})).continuations[index] = list(continuation)
    return list(found.values())


def apart(questions: Iterable[Question], longest: int = 0) -> list[Question]:
    """Split questions so that what is read of each stays within ``longest`` tokens, where a continuation alone does."""
    split = []
    for question in questions:
        part: dict[int, list[int]] = {}
        used = len(question.context)
        for index, continuation in question.continuations.items():
            if part and used + len(continuation) - 1 > longest:
                split.append(Question(question.context, part))
                part, used = {}, len(question.context)
            part[index] = continuation
            used += len(continuation) - 1
        split.append(Question(question.context, part))
    return split


# -- shared beginnings -----------------------------------------------------------------------------------------------------


def by_prefix(questions: Sequence[Question]) -> list[tuple[list[int], list[Question]]]:
    """Group questions by a beginning of their contexts worth computing once; ``[]`` is the beginning of those without.

    Every context keeps at least one token outside the beginning.
    """
    ordered = sorted(questions, key=lambda question: question.context)
    common = [0, *(_common(a.context, b.context) for a, b in pairwise(ordered))]
    alone: list[Question] = []
    groups = []
    for start, stop, length in _families(common, 0, len(ordered), 0):
        members = ordered[start:stop]
        if length:
            groups.append((members[0].context[:length], [Question(q.context, q.continuations, length) for q in members]))
        else:
            alone += members
    return [*([([], alone)] if alone else []), *groups]


def _common(left: list[int], right: list[int]) -> int:
    """Return how many tokens two contexts share at their beginning, at least one left over in each."""
    limit = min(len(left), len(right)) - 1
    return next((i for i in range(limit) if left[i] != right[i]), limit)


def _families(common: list[int], start: int, stop: int, length: int) -> list[tuple[int, int, int]]:
    """Return ``(start, stop, shared tokens)`` of runs of sorted contexts: ``length`` for all, or longer ones for parts of it.

    Args:
        common: what each context shares with the one before it. length: what all from ``start`` to ``stop`` are known to share.
    """
    least = length + SHORTEST_PREFIX
    parts: list[tuple[int, int, int]] = []
    begin = start
    for place in range(start + 1, stop + 1):
        if place == stop or common[place] < least:
            inside = min(common[begin + 1 : place], default=0)
            parts += _families(common, begin, place, inside) if inside else [(begin, place, 0)]
            begin = place
    whole = (start, stop, length if (stop - start - 1) * length >= LEAST_SAVED else 0)
    return parts if _saved(parts) > _saved([whole]) else [whole]


def _saved(families: Iterable[tuple[int, int, int]]) -> int:
    return sum((stop - start - 1) * length for start, stop, length in families)


# -- batches ---------------------------------------------------------------------------------------------------------------


def by_length(questions: Iterable[Question]) -> list[Question]:
    """Put questions of about one length next to one another, the longest first."""
    return sorted(questions, key=lambda question: -question.read)


def end_to_end(
    items: Iterable[Item], tokens: int, read: Callable[[Any], int] = lambda question: question.read
) -> Iterator[list[Item]]:
    """Yield runs of questions, or of other items, that read at most ``tokens`` tokens (one item, where it is longer)."""
    run: list[Item] = []
    used = 0
    for item in items:
        if run and used + read(item) > tokens:
            yield run
            run, used = [], 0
        run.append(item)
        used += read(item)
    if run:
        yield run


def batches(items: Sequence[Any], width: Callable[[Any], int], tokens: int) -> Iterator[list[Any]]:
    """Yield runs of items (sorted by falling width) whose padded size stays within ``tokens``."""
    batch: list[Any] = []
    for item in items:
        if batch and (len(batch) + 1) * width(batch[0]) > tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def lay_end_to_end(questions: Sequence[Question]) -> Batch:
    """Lay questions out in one row, without what stands in their prefix."""
    ids: list[int] = []
    positions: list[int] = []
    batch = Batch(torch.empty(0), torch.empty(0))
    for question in questions:
        batch.ask(question, len(ids))
        length = len(question.context)
        ids += question.context[question.shared :]
        positions += range(question.shared, length)
        for continuation in question.continuations.values():
            ids += continuation[:-1]
            positions += range(length, length + len(continuation) - 1)
        shown = [len(continuation) - 1 for continuation in question.continuations.values()]
        batch.parts.append([length - question.shared, *shown])
    batch.ids, batch.positions = torch.tensor([ids]), torch.tensor([positions])
    return batch


def lay_side_by_side(questions: Sequence[Question]) -> Batch:
    """Lay each question out in a row of its own, padded on the right, with a mask where a question has several continuations."""
    width = max(question.read for question in questions)
    ids = torch.zeros(len(questions), width, dtype=torch.int64)
    positions, part = torch.zeros_like(ids), torch.full_like(ids, -1)  # 0: context, 1..: continuations, -1: padding
    batch = Batch(ids, positions)
    for row, question in enumerate(questions):
        alone = lay_end_to_end([question])
        length = alone.ids.shape[1]
        ids[row, :length], positions[row, :length] = alone.ids[0], alone.positions[0]
        part[row, :length] = torch.repeat_interleave(torch.arange(len(alone.parts[0])), torch.tensor(alone.parts[0]))
        batch.ask(question, row * width)
    if any(len(question.continuations) > 1 for question in questions):
        order = torch.arange(width)
        seen = (part[:, None, :] == part[:, :, None]) | (part[:, None, :] == 0)
        batch.mask = (seen & (order[None] <= order[:, None])) | torch.eye(width, dtype=torch.bool)
    return batch
