"""The index of methods: every published answer, by axis and by name.

Knows: what every method has in common (a name, an axis, a family, a paper, a summary, its departures from the paper, and its
hyper-parameters as pydantic fields), and how a method is found by name, here or in a third party's package.
Does not know: what any method does. Each axis adds its own abstract class (``ParameterMethod``, ``Form``, ...).

A new method is one file: subclass the axis's class, set the class variables, and it is in the catalogue as soon as its
module is imported. A third party's package registers its module under the entry-point group ``selectune.methods``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from selectune.errors import UserError, nearest

AXES = {
    "examples": "selectune.examples",
    "parameters": "selectune.parameters",
    "adapters": "selectune.adapters",
    "objectives": "selectune.objectives",
    "policies": "selectune.training.policies",
    "merging": "selectune.merging",
}
"""Axis -> the package whose modules hold its methods."""
KEYS = {
    "examples": "examples",
    "parameters": "parameters",
    "adapters": "form",
    "objectives": "objective",
    "policies": "policy",
    "merging": "finish",
}
"""Axis -> the key under which a recipe names its method."""
_REGISTRY: dict[str, dict[str, type[Method]]] = {}
_loaded = False


class Method(BaseModel):
    """One answer to the question of one axis; its fields are its hyper-parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    axis: ClassVar[str]
    family: ClassVar[str] = ""
    """The page of docs/methods that it stands on; left out: the axis."""
    paper: ClassVar[str] = ""
    summary: ClassVar[str]
    departs: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if inspect.isabstract(cls) or "name" not in cls.__dict__:
            return
        known = _REGISTRY.setdefault(cls.axis, {})
        if cls.name in known and known[cls.name].__qualname__ != cls.__qualname__:
            raise ValueError(f"two methods of axis '{cls.axis}' are called '{cls.name}'")
        known[cls.name] = cls

    def describe(self) -> dict[str, Any]:
        """Return the method as a recipe would write it: its name and its hyper-parameters."""
        return {"method": self.name, **self.model_dump(mode="json")}


def methods(axis: str) -> dict[str, type[Method]]:
    """Return the methods of one axis by name, the package's own and those of entry points."""
    _load()
    return dict(sorted(_REGISTRY.get(axis, {}).items()))


def create(axis: str, choice: str | dict[str, Any], where: str = "") -> Method:
    """Make the method that a recipe names: ``"name"``, ``"name:key=value,key=value"`` or ``{"method": name, ...}``.

    Raises:
        UserError: the name or a hyper-parameter is unknown (the nearest known one is named) or has a wrong value.
    """
    where = where or axis
    values = _parse_shorthand(choice, where) if isinstance(choice, str) else dict(choice)
    name = values.pop("method", None)
    known = methods(axis)
    if not isinstance(name, str) or name not in known:
        raise UserError(f"unknown method '{name}'{nearest(str(name), known)}", field=where, expected=f"one of {', '.join(known)}")
    method = known[name]
    for key in values:
        if key not in method.model_fields:
            raise UserError(
                f"'{name}' has no hyper-parameter '{key}'{nearest(key, method.model_fields)}",
                field=f"{where}.{key}",
                expected=f"one of {', '.join(method.model_fields) or 'none'}",
            )
    try:
        return method(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([where, *(str(part) for part in first["loc"])])
        raise UserError(f"{first['msg']}, not {first.get('input')!r}", field=field) from None


def _parse_shorthand(text: str, where: str) -> dict[str, Any]:
    name, _, rest = text.partition(":")
    values: dict[str, Any] = {"method": name.strip()}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"'{part}' is not key=value", field=where, expected="name:key=value,key=value")
        values[key.strip()] = value.strip()
    return values


def _load() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True
    for name in AXES.values():
        for module in pkgutil.iter_modules(importlib.import_module(name).__path__):
            importlib.import_module(f"{name}.{module.name}")
    for entry in importlib.metadata.entry_points(group="selectune.methods"):
        entry.load()
