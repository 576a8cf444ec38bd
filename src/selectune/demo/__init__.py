"""The built-in example domain: the service manual of the Tidewren 7, an invented seaweed press.

Knows: where its training records, test questions and manual are.
Does not know: how they were written (`build.py`), or how they are read and used.

Everything here was written for this project, under its licence (Apache-2.0). No base model can have seen it.
"""

from pathlib import Path


def files() -> dict[str, Path]:
    """Return the paths of `train.jsonl`, `test.jsonl` and `manual.md`, by these names."""
    return {name: Path(__file__).with_name(name) for name in ("train.jsonl", "test.jsonl", "manual.md")}


def recipe(output: str | Path = "runs", minutes: float | None = None) -> dict[str, object]:
    """Return the recipe of the demonstration, as values.

    Args:
        output: the folder that holds the runs. minutes: of training on this machine, at most; left out: four epochs.
    """
    paths = files()
    return {
        "name": "demo",
        "output": str(output),
        "data": {"train": str(paths["train.jsonl"]), "test": str(paths["test.jsonl"]), "max_length": 256, "system": "Tidewren 7."},
        "form": "full",
        "parameters": "fisher_blocks:k=8",
        "training": {"epochs": 4, "learning_rate": 2e-4, "batch_sequences": 2, "micro_batch_sequences": 2, "evaluations": 4},
        "budget": {"minutes": minutes},
        "evaluation": {"target_items": None, "samples": 12, "max_new_tokens": 32},
    }  # fmt: skip
