"""What a person sees of a long loop.

Knows: a bar with the time left, on standard error, gone when the loop ends; bars within bars stack, since one console draws them all. Does not
know: what is done. Training and experiments, which say more, have lines of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import TypeVar, cast

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")

CONSOLE = Console(stderr=True)
"""Where bars are drawn: wherever standard error goes at that moment."""


def watched(items: Iterable[Item], shown: str, quiet: bool, total: int | None = None) -> Iterable[Item]:
    """Return items to go through, with a progress bar unless there is one only or it should be quiet.

    Args:
        shown: what is done, in a few words. total: how many items there are, where they cannot say.
    """
    count = len(cast(Sized, items)) if total is None else total
    return items if quiet or count < 2 else track(items, shown, count, console=CONSOLE, transient=True)
