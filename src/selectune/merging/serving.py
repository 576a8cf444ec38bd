"""Several specialists on one base in memory.

Knows: which delta the base carries now; that to change it only the entries of the old and the new one are written.
Does not know: what a delta is made of (``delta.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from selectune.errors import UserError, nearest
from selectune.merging.delta import Delta

if TYPE_CHECKING:
    from selectune.models import Base


class Serving:
    """A base and named deltas of it, one of them in use.

    The base's weights belong to this object while it lives. A delta is checked once, when it is added; a change of the one in use
    only writes (1 % of the linear layers of a base of 135 M: some hundredths of a second).
    """

    def __init__(self, base: Base, deltas: Mapping[str, Delta] | None = None) -> None:
        self.base = base
        self._deltas: dict[str, Delta] = {}
        self._active: str | None = None
        for name, delta in (deltas or {}).items():
            self.add(name, delta)

    @property
    def model(self) -> Any:
        """The model as it is now."""
        return self.base.model

    @property
    def active(self) -> str | None:
        """The delta in use; None: the base itself."""
        return self._active

    def names(self) -> list[str]:
        """Return the deltas that may be used, sorted."""
        return sorted(self._deltas)

    def add(self, name: str, delta: Delta) -> None:
        """Make a delta ready for use; one of the same name is replaced.

        Raises:
            UserError: it belongs to another base, or its entries were changed in this one.
        """
        delta.belongs(self.base)
        with self.using(None):
            delta.check(self.model, delta.before, "the entries do not hold the base's values")
        if name == self._active:
            self.use(None)
        self._deltas[name] = delta

    def remove(self, name: str) -> None:
        """Forget a delta; the base is in use where that one was.

        Raises:
            UserError: no such delta.
        """
        self._served(name)
        if name == self._active:
            self.use(None)
        del self._deltas[name]

    def use(self, name: str | None) -> Any:
        """Make the model that of a delta (of the base itself: None) and return it.

        Raises:
            UserError: no such delta.
        """
        new = None if name is None else self._served(name)
        if name == self._active:
            return self.model
        if self._active is not None:
            old = self._deltas[self._active]
            old.put(self.model, old.before)
        if new is not None:
            new.put(self.model, new.after)
        self._active = name
        return self.model

    def _served(self, name: str) -> Delta:
        """Return a delta by its name."""
        if name not in self._deltas:
            raise UserError(f"no delta '{name}' is served{nearest(name, self._deltas)}", expected=" or ".join(self.names()))
        return self._deltas[name]

    @contextmanager
    def using(self, name: str | None) -> Iterator[Any]:
        """Use a delta for the length of a block, then the one of before."""
        previous = self._active
        try:
            yield self.use(name)
        finally:
            self.use(previous)
