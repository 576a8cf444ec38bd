"""Mistakes a user can make, as one line each.

Knows: how to say what is wrong with an input: the file, the line, the field, what was expected and how to mend it.
Does not know: any particular mistake; each module raises its own where it finds it.

A ``UserError`` never reaches a person as a traceback: the command line prints it as one line and exits with status 2.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

EXIT_MISTAKE = 2  # the input was wrong
EXIT_LOST = 3  # ``--require-retention`` and something was lost
EXIT_OVER_BUDGET = 4  # ``selectune plan``: more memory or time than the budget
EXIT_INTERRUPTED = 130  # Ctrl-C, with a checkpoint


class UserError(Exception):
    """A mistake in something the user gave, told in one line.

    Args:
        problem: what is wrong, in the user's terms.
        file: the file it is wrong in.
        line: the line in that file, counted from 1.
        field: the field, column or recipe key.
        expected: what would have been right.
        mend: what to do now.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        field: str | None = None,
        expected: str | None = None,
        mend: str | None = None,
    ) -> None:
        self.problem, self.file, self.line = problem, file, line
        self.field, self.expected, self.mend = field, expected, mend
        super().__init__(str(self))

    def __str__(self) -> str:
        place = "" if self.file is None else str(self.file)
        if self.line is not None:
            place += f"{':' if place else 'line '}{self.line}"
        if self.field is not None:
            place += f"{', ' if place else ''}field '{self.field}'"
        parts = [f"{place}: {self.problem}" if place else self.problem]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.mend:
            parts.append(f"to mend it: {self.mend}")
        return "; ".join(" ".join(part.split()) for part in parts)


def unwritable(error: BaseException) -> str | None:
    """Return why something could not be written (no space, no permission, read-only), if that is what the error is; None otherwise.

    Libraries that write from C++ or Rust tell a full disk in words of their own: PyTorch's ``iostream error`` or ``unexpected pos`` in its
    container, safetensors' ``No space left``.
    """
    if isinstance(error, OSError):
        return error.strerror if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS) else None
    said = str(error)
    full = "No space left on device" in said or "iostream error" in said or "inline_container.cc" in said
    return os.strerror(errno.ENOSPC) if full else None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up: Python's own, or in the words of PyTorch's allocators or the system's."""
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or any(said in str(error).lower() for said in words)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known word nearest to ``word``, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
