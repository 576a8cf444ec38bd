"""What a person sees of a long loop. Knows: a progress bar on standard error, gone when it ends. Does not know: what is done."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def watched(items: Sequence[Item], shown: str, quiet: bool) -> Iterable[Item]:
    """Return items to go through, with a progress bar unless there is one only or it should be quiet."""
    return items if quiet or len(items) < 2 else track(items, shown, console=Console(file=sys.stderr), transient=True)
