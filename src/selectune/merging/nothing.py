"""The specialist stays as it was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from selectune.merging.method import Finish

if TYPE_CHECKING:
    from selectune.parameters.method import Context


class Nothing(Finish):
    """All of it."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "All of it: the specialist stays as it was trained."

    def finish(self, model: Any, context: Context) -> dict[str, Any]:
        return {}
