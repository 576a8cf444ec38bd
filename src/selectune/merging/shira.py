"""Deltas as PEFT's SHiRA adapters, and back.

Knows: PEFT's file (fp32 changes as ``shira_weight``, ``(2, n)`` int32 rows and columns as ``shira_indices``, one rank for all layers
that fixes n to rank x (inputs + outputs)); how a support of any size is filled up to n with entries that change nothing.
Does not know: how deltas are applied or added.

Source: *Sparse High Rank Adapters*, NeurIPS 2024, arXiv 2406.13175, as PEFT implements it (``peft.tuners.shira``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selectune.adapters.form import ORIGIN, read_origin, write_origin
from selectune.errors import UserError
from selectune.merging.delta import Delta, differ
from selectune.parameters.selection import Part, Selection

if TYPE_CHECKING:
    from selectune.models import Base

ADAPTER = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FILLER = -0.0  # the one number that changes no other when it is added; the change of an unchanged entry is +0.0


def to_shira(delta: Delta, base: Base, folder: Path) -> int:
    """Write a delta as an adapter that ``peft.PeftModel.from_pretrained`` loads.

    The file holds changes in fp32, so an entry that shrank to less than half or changed its sign may come back one unit in the
    change's last place away, and no change gives -0.0: it comes back as 0.0.

    Returns:
        The number of entries that do not come back bit for bit in fp32.

    Raises:
        UserError: another base; entries outside of linear layers; more entries than one rank of all layers holds.
    """
    from peft import ShiraConfig

    delta.belongs(base)
    parts = delta.selection.parts
    if not parts:
        raise UserError("an empty delta is no adapter", expected="at least one entry")
    for name in parts:
        module = base.model.get_submodule(name.rpartition(".")[0])
        if not (isinstance(module, nn.Linear) and name.endswith(".weight")):
            raise UserError(f"'{name}' is not the weight of a linear layer, and SHiRA has nothing else",
                            mend="restrict the delta to the linear layers, or keep its own format")  # fmt: skip
    rank = max(-(-part.count() // sum(part.shape)) for part in parts.values())
    for name, part in parts.items():
        if rank * sum(part.shape) > part.shape[0] * part.shape[1]:
            raise UserError(f"too many entries for SHiRA: rank {rank}, which the densest matrix needs, is more than '{name}' has room for",
                            mend="restrict the delta, or keep its own format")  # fmt: skip
    tensors, missed = {}, 0
    for name, part in parts.items():
        before, after = (_flat(part, side[name].float()) for side in (delta.before, delta.after))
        change = after - before + 0.0  # of a zero that changed its sign -0.0, which would be a filler
        missed += int(differ(before + change, after).sum())
        index, values = _filled(part.flat().index, change, rank * sum(part.shape), part.shape[0] * part.shape[1])
        key = _PREFIX + name.removesuffix(".weight")
        tensors[f"{key}.shira_indices"] = torch.stack([index // part.shape[1], index % part.shape[1]]).int()
        tensors[f"{key}.shira_weight"] = values
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    layers = [name.removesuffix(".weight") for name in parts]
    ShiraConfig(
        r=rank, target_modules=layers, base_model_name_or_path=base.spec, task_type="CAUSAL_LM", inference_mode=True
    ).save_pretrained(str(folder))
    write_origin(folder, delta.spec, delta.fingerprint, {"method": "shira"})
    return missed


def from_shira(folder: Path, base: Base) -> Delta:
    """Read a SHiRA adapter, PEFT's own or one of :func:`to_shira`, as a delta in fp32.

    Raises:
        UserError: no SHiRA adapter, or one of another base.
    """
    from peft import PeftConfig

    if not (folder / "adapter_config.json").is_file() or not (folder / ADAPTER).is_file():
        raise UserError("holds no adapter", file=folder, expected=f"a folder with adapter_config.json and {ADAPTER}")
    config: Any = PeftConfig.from_pretrained(str(folder))
    if str(getattr(config.peft_type, "value", config.peft_type)) != "SHIRA":
        raise UserError(f"is not a SHiRA adapter (it is {config.peft_type})", file=folder)
    if (folder / ORIGIN).is_file():
        read_origin(folder, base)
    weights = dict(base.model.named_parameters())
    tensors = load_file(folder / ADAPTER)
    parts, before, after = {}, {}, {}
    for key in sorted(tensors):
        if not key.endswith(".shira_weight"):
            continue
        name = key.removeprefix(_PREFIX).removesuffix(".shira_weight") + ".weight"
        rows, columns = tensors[key.removesuffix("weight") + "indices"].long()
        if name not in weights or rows.max() >= weights[name].shape[0] or columns.max() >= weights[name].shape[1]:
            raise UserError(f"'{name}' is not in the base, or smaller there", file=folder, expected="the base of the adapter")
        flat, order = (rows * weights[name].shape[1] + columns).sort()
        change = tensors[key].float()[order]
        real = ~((change == 0) & change.signbit())
        parts[name] = Part(tuple(weights[name].shape), "elements", flat[real])
        before[name] = parts[name].take(weights[name].detach()).float().cpu()
        after[name] = before[name] + change[real]
    kept = {name: part for name, part in parts.items() if len(part.index)}
    return Delta(
        base.spec,
        base.fingerprint,
        Selection(kept),
        {name: before[name] for name in kept},
        {name: after[name] for name in kept},
    )


def _flat(part: Part, values: Tensor) -> Tensor:
    """Return a part's values in the order of its flat numbers."""
    places = part.take(torch.arange(part.shape[0] * part.shape[1]).view(part.shape))
    return values.reshape(-1)[places.reshape(-1).argsort()]


def _filled(index: Tensor, change: Tensor, wanted: int, size: int) -> tuple[Tensor, Tensor]:
    """Add the first entries that are not in the support, with a change that changes nothing; sorted."""
    free = torch.ones(size, dtype=torch.bool)
    free[index] = False
    more = free.nonzero().squeeze(-1)[: wanted - len(index)]
    both, order = torch.cat([index, more]).sort()
    return both, torch.cat([change, torch.full((len(more),), _FILLER)])[order]
