"""The built-in example domain: the service manual of the Tidewren 7, an invented seaweed press.

Knows: where its training records, test questions and manual are.
Does not know: how they were written (`build.py`), or how they are read and used.

Everything here was written for this project, under its licence (Apache-2.0). No base model can have seen it.
"""

from pathlib import Path


def files() -> dict[str, Path]:
    """Return the paths of `train.jsonl`, `test.jsonl` and `manual.md`, by these names."""
    return {name: Path(__file__).with_name(name) for name in ("train.jsonl", "test.jsonl", "manual.md")}
