"""Records into sequences: several to a sequence, none of which sees another, or each by itself in batches of like length.

Knows: best-fit packing, batches of sequences, an order in which the sequences of a batch have like lengths, and the positions that
restart with every record (with ``use_cache=False`` transformers builds the block-diagonal attention mask from them, so packed
records give the losses and gradients of unpacked ones).
Does not know: what the tokens mean.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from selectune.data.chat import IGNORE, Encoded


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
