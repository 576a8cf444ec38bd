"""Deltas and selections as a person names them: a run, a specialist, a delta's folder, an adapter of PEFT's, a file.

Knows: what each of these is on disk, when the base must be loaded for it, and what the commands about deltas write.
Does not know: what a delta is made of (``delta.py``), or how a command is spelled (``cli/selection.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from selectune.adapters.form import CHANGED, ORIGIN, PLACES
from selectune.errors import UserError
from selectune.merging.delta import ORIGINAL, Delta, origin_in_place
from selectune.merging.shira import from_shira, to_shira
from selectune.models import Base, load_base
from selectune.parameters.selection import Part, Selection
from selectune.run import folder_atomically

CONFIG = "adapter_config.json"


def selection_at(place: Path) -> Selection:
    """Read which entries a run may change, a specialist or delta has changed, or a file names.

    Raises:
        UserError: nothing of the kind is there.
    """
    folder = place / "specialist" if not (place / PLACES).is_file() and (place / "specialist").is_dir() else place
    try:
        if place.is_file():
            return Selection.load(place)
        if (folder / PLACES).is_file():
            return Selection.load(folder / PLACES)
        if (folder / CHANGED).is_file():  # whole tensors: their shapes say it all
            with safe_open(folder / CHANGED, framework="pt") as file:
                return Selection({name: Part(tuple(file.get_slice(name).get_shape())) for name in sorted(file.keys())})
    except (SafetensorError, KeyError, TypeError, OSError):
        raise UserError("holds no selection", file=place, expected=f"a {PLACES}") from None
    if (place / "recipe.yaml").is_file():
        raise UserError("has not chosen its weights yet", file=place, mend=f"selectune resume {place}")
    if (place / CONFIG).is_file():
        raise UserError(
            "is an adapter and names no entries of weights", file=place, expected="a run, or what was trained in place"
        )
    raise UserError("holds no selection" if place.exists() else "no such run or file", file=place, mend="see `selectune runs`")


def deltas_at(places: Sequence[Path], base: str | None = None) -> list[Delta]:
    """Read deltas from runs that trained in place, specialists, deltas' folders or SHiRA adapters.

    The base is loaded (once) where a place does not keep the base's values; it is found where the first was trained from it, or
    named.

    Raises:
        UserError: a place holds no delta, or one of another base.
    """
    folders = [_folder(place) for place in places]
    names = [_base_of_adapter(folder) if _is_shira(folder) else str(origin_in_place(folder)["base"]) for folder in folders]
    needed = base is not None or not all((folder / ORIGINAL).is_file() for folder in folders)
    loaded = load_base(base or names[0]) if needed else None
    return [from_shira(folder, _there(loaded)) if _is_shira(folder) else Delta.load(folder, loaded) for folder in folders]


def diff(base: str, model: str, target: Path) -> Delta:
    """Write what differs between a base and a model of the same architecture, or what a run or delta really changed."""
    with _fresh(target) as folder:
        place = Path(model)
        if (place / "recipe.yaml").is_file() or (place / ORIGIN).is_file() or _is_shira(place):
            delta = deltas_at([place], base)[0].changed()
        else:
            delta = Delta.of(load_base(base), load_base(model).model)
        delta.save(folder)
    return delta


def compose(places: Sequence[Path], minus: Sequence[Path], target: Path, base: str | None = None) -> Delta:
    """Write the sum of deltas, less others."""
    with _fresh(target) as folder:
        first, *others = deltas_at([*places, *minus], base)
        delta = first.compose(*others[: len(places) - 1], minus=others[len(places) - 1 :])
        delta.save(folder)
    return delta


def restrict(place: Path, selection: Path, target: Path, base: str | None = None) -> Delta:
    """Write a delta on the entries alone that a selection names."""
    with _fresh(target) as folder:
        kept = selection_at(selection)
        delta = deltas_at([place], base)[0].restrict(kept)
        delta.save(folder)
    return delta


def convert(place: Path, to: Literal["shira", "delta"], target: Path, base: str | None = None) -> int:
    """Write a delta as PEFT's SHiRA adapter, or an adapter as a delta; return how many entries fp32 changes do not give back."""
    with _fresh(target) as folder:
        delta = deltas_at([place], base)[0]
        if to == "shira":
            return to_shira(delta, load_base(base or delta.spec), folder)
        delta.save(folder)
    return 0


def apply(places: Sequence[Path], target: Path, base: str | None = None) -> Delta:
    """Write the base with the sum of deltas applied as a transformers folder."""
    with _fresh(target) as folder:
        first, *others = deltas_at(places, base)
        delta = first.compose(*others)
        loaded = load_base(base or delta.spec)
        delta.apply(loaded)
        _save(loaded, folder)
    return delta


def revert(model: str, place: Path, target: Path, base: str | None = None) -> bool:
    """Write the base that a model with a delta applied was made from, as a transformers folder.

    Returns:
        Whether the base was at hand and every weight was compared with it, bit for bit.

    Raises:
        UserError: the model does not hold the delta's values, or is not the base when they are taken out.
    """
    with _fresh(target) as folder:
        delta = deltas_at([place], base)[0]
        loaded = load_base(model)
        delta.check(loaded.model, delta.after, f"'{model}' does not hold this delta's values")
        delta.put(loaded.model, delta.before)
        try:
            original = load_base(base or delta.spec)
            delta.belongs(original)
        except UserError:
            if base is not None:
                raise
            original = None
        if original is not None and (rest := Delta.of(original, loaded.model).count()):
            raise UserError(f"{rest:,} more entries differ from the base", file=model, expected="the base with this delta and no other",
                            mend="revert the other deltas too, the last one first")  # fmt: skip
        _save(loaded, folder)
    return original is not None


def _there(base: Base | None) -> Base:
    assert base is not None  # an adapter keeps no values of its base, so it was loaded
    return base


def _folder(place: Path) -> Path:
    """Return the folder that holds the tensors."""
    if (place / "recipe.yaml").is_file():
        if not (place / "specialist").is_dir():
            raise UserError("is not trained yet", file=place, mend=f"selectune resume {place}")
        return place / "specialist"
    if (place / ORIGIN).is_file() or _is_shira(place):
        return place
    raise UserError("holds no delta" if place.exists() else "no such run or delta", file=place,
                    expected="a run, its specialist, a folder of `selectune delta`, or a SHiRA adapter")  # fmt: skip


def _is_shira(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type") == "SHIRA"


def _base_of_adapter(folder: Path) -> str:
    return str(json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path"))


def _save(base: Base, folder: Path) -> None:
    base.model.to(base.dtype).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


@contextmanager
def _fresh(target: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes the target, which must not be there."""
    if target.exists():
        raise UserError("is there already", file=target, mend="name another folder")
    with folder_atomically(target) as folder:
        yield folder
