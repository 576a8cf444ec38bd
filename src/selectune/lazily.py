"""Names of a package that are imported when they are asked for.

For packages whose names need what takes seconds to load, and in which or beside which lies what does not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence


def imported(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], object]:
    """Return a package's ``__getattr__``.

    Args:
        names: of each of the package's modules, those that the package has from it.
    """
    places = {name: module for module, some in names.items() for name in some}

    def get(name: str) -> object:
        if name not in places:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(f"{package}.{places[name]}"), name)

    return get
