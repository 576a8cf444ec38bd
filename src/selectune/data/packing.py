"""Records into sequences of one length, several to a sequence, none of which sees another.

Knows: best-fit packing, and the positions that restart with every record (with ``use_cache=False`` transformers builds
the block-diagonal attention mask from them, so packed records give the losses and gradients of unpacked ones).
Does not know: what the tokens mean.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import torch
from torch import Tensor

from selectune.data.chat import IGNORE, Encoded


def pack(encoded: list[Encoded], max_length: int, packing: bool = True, pad_id: int | None = 0) -> list[dict[str, Tensor]]:
    """Fill sequences with records.

    Best fit: the longest records first, each into the sequence with the least room that still holds it; ties by index. No
    record is split. Padding is a record of its own at the end, whose labels are -100.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, each int64 of shape ``(max_length,)``. Unpacked, the length is that
        of the longest record.

    Raises:
        ValueError: a record is longer than ``max_length``.
    """
    if any(len(record.input_ids) > max_length for record in encoded):
        raise ValueError(f"a record is longer than {max_length} tokens")
    if not packing:
        max_length = max((len(record.input_ids) for record in encoded), default=max_length)
        bins = [[index] for index in range(len(encoded))]
    else:
        bins = _best_fit([len(record.input_ids) for record in encoded], max_length)
    return [_fill([encoded[index] for index in members], max_length, pad_id or 0) for members in bins]


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


def _fill(records: list[Encoded], length: int, pad_id: int) -> dict[str, Tensor]:
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for record in records:
        ids += record.input_ids
        labels += [IGNORE, *record.labels[1:]]  # the first token of a record is predicted by no other
        positions += range(len(record.input_ids))
    padding = length - len(ids)
    ids += [pad_id] * padding
    labels += [IGNORE] * padding
    positions += range(padding)
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "position_ids": torch.tensor(positions),
    }
