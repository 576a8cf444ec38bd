"""Records into sequences: several to a sequence, none of which sees another, or each by itself in batches of like length.

Knows: best-fit packing, batches of sequences, an order in which the sequences of a batch have like lengths, and the positions that
restart with every record (with ``use_cache=False`` transformers builds the block-diagonal attention mask from them, so packed
records give the losses and gradients of unpacked ones); where the records of a batch begin and end, and some of them as a batch.
Does not know: what the tokens mean.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.data import Sampler

from selectune.data.chat import IGNORE, Encoded

ROUND = 32
"""Lengths are multiples of this: for every new size of a bf16 product a kernel is compiled (two to six milliseconds), and kept for a while."""

Spans = list[tuple[int, int]]
"""Where records begin and end, in all rows of a batch laid end to end."""


def rounded(length: int) -> int:
    """Return a length rounded up."""
    return -(-length // ROUND) * ROUND


def pack(encoded: list[Encoded], max_length: int, packing: bool = True, pad_id: int | None = 0) -> list[dict[str, Tensor]]:
    """Fill sequences with records.

    Best fit: the longest records first, each into the sequence with the least room that still holds it; ties by index. No
    record is split. Padding is a record of its own at the end, whose labels are -100.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, each int64 of shape ``(max_length,)``; unpacked, each record has its own length. Where some
        record has a weight that is not 1, also ``weights``, fp32: each token has its record's.

    Raises:
        ValueError: a record is longer than ``max_length``.
    """
    if any(len(record.input_ids) > max_length for record in encoded):
        raise ValueError(f"a record is longer than {max_length} tokens")
    weighted = any(record.weight != 1 for record in encoded)
    if not packing:
        return [_fill([record], len(record.input_ids), 0, weighted) for record in encoded]
    bins = _best_fit([len(record.input_ids) for record in encoded], max_length)
    return [_fill([encoded[index] for index in members], max_length, pad_id or 0, weighted) for members in bins]


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return sequences as a batch, ``(sequences, longest)`` each; shorter ones are filled up with padding, a record of its own."""
    longest = max(len(row["input_ids"]) for row in rows)
    return {key: torch.stack([_lengthen(key, row[key], longest) for row in rows]) for key in rows[0]}


def _lengthen(key: str, values: Tensor, length: int) -> Tensor:
    if values.dim() == 0 or len(values) == length:
        return values
    rest = length - len(values)
    filling = torch.arange(rest) if key == "position_ids" else torch.full((rest,), IGNORE if key == "labels" else 0)
    return torch.cat([values, filling.to(values.dtype)])


def record_spans(position_ids: Tensor, labels: Tensor | None = None) -> Spans:
    """Return the records of packed sequences.

    Args:
        position_ids: ``(batch, length)`` int64, 0 where a record begins. labels: the same shape; a record whose labels are all
            -100 (padding, for instance) is left out: nobody asks for its attention.
    """
    batch, length = position_ids.shape
    begins = (position_ids == 0).cpu()
    begins[:, 0] = True
    starts = [*begins.reshape(-1).nonzero().squeeze(-1).tolist(), batch * length]
    learnt = torch.ones(batch * length, dtype=torch.bool) if labels is None else (labels != -100).cpu().reshape(-1)
    sums = [0, *learnt.cumsum(0).tolist()]
    return [(start, end) for start, end in pairwise(starts) if sums[end] > sums[start]]


def in_records(batch: dict[str, Tensor]) -> Tensor:
    """Return which tokens of a batch lie in a record that is learnt, ``(sequences, length)`` bool; those of padding do not."""
    labels = batch["labels"]
    found = torch.zeros(labels.numel(), dtype=torch.bool)
    for start, end in record_spans(batch["position_ids"], labels):
        found[start:end] = True
    return found.view(labels.shape).to(labels.device)


def repacked(batch: dict[str, Tensor], spans: Spans, alone: bool = False) -> dict[str, Tensor]:
    """Return some records of a batch as a batch of their own, in as few and as short sequences as hold them.

    Args:
        batch: ``input_ids``, ``labels``, ``position_ids``, ``(sequences, length)`` int64, and ``weights`` where records have any. spans: of the
            records, in all sequences laid end to end.
        alone: each record stays a sequence.
    """
    device, width = batch["input_ids"].device, batch["input_ids"].shape[1]
    ids, labels = (batch[key].reshape(-1).tolist() for key in ("input_ids", "labels"))
    weights = batch["weights"].reshape(-1).tolist() if "weights" in batch else [1.0] * len(ids)
    pieces = [Encoded(ids[a:b], labels[a:b], weights[a]) for a, b in spans]
    rows = pack(pieces, width, packing=False)
    if not alone:
        total, longest = sum(b - a for a, b in spans), max(b - a for a, b in spans)
        fewest = math.ceil(total / width)
        short = min(width, rounded(max(math.ceil(total / fewest), longest)))
        rows = pack(pieces, short)
        rows = rows if len(rows) == fewest else pack(pieces, width)
    return {key: value.to(device) for key, value in stack(rows).items()}


class LikeLengths(Sampler[int]):
    """Sequences in an order, new in each epoch, in which those of a batch have like lengths.

    A random order is cut into stretches of fifty batches; each is sorted by length, and the batches of an epoch are shuffled.

    Args:
        lengths: of all sequences. batch: sequences in a batch. seed: of the order.
    """

    STRETCH = 50

    def __init__(self, lengths: list[int], batch: int, seed: int) -> None:
        self._lengths, self._batch, self._seed, self._epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes: its order depends on the seed and on nothing else."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        size = self._batch * self.STRETCH
        stretches = [sorted(order[i : i + size], key=lambda n: -self._lengths[n]) for i in range(0, len(order), size)]
        ranked = [number for stretch in stretches for number in stretch]
        batches = [ranked[i : i + self._batch] for i in range(0, len(ranked), self._batch)]
        last = [batches.pop()] if len(batches[-1]) < self._batch else []  # an unfilled batch stays at the end
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return iter([number for batch in shuffled + last for number in batch])


def _best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(rooms, (lengths[index], -1))
        if place < len(rooms):
            room, number = rooms.pop(place)
            bins[number].append(index)
        else:
            room, number = capacity, len(bins)
            bins.append([index])
        insort(rooms, (room - lengths[index], number))
    return bins


def _fill(records: list[Encoded], length: int, pad_id: int, weighted: bool) -> dict[str, Tensor]:
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    weights: list[float] = []
    for record in records:
        ids += record.input_ids
        labels += [IGNORE, *record.labels[1:]]  # the first token of a record is predicted by no other
        positions += range(len(record.input_ids))
        weights += [record.weight] * len(record.input_ids)
    padding = length - len(ids)
    ids += [pad_id] * padding
    labels += [IGNORE] * padding
    positions += range(padding)
    row = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "position_ids": torch.tensor(positions)}
    return row | {"weights": torch.tensor(weights + [0.0] * padding)} if weighted else row
