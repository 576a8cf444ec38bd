"""Selectune: selective fine-tuning of small language models, with proof that nothing else was lost."""

from __future__ import annotations

__version__ = "0.1.0"
import logging as _logging

_logging.getLogger("bitsandbytes").setLevel(_logging.ERROR)  # it announces an optional kernel that is not needed


def __getattr__(name: str) -> object:
    if name in ("specialize", "resume", "plan"):
        from selectune import pipeline

        return getattr(pipeline, name)
    if name == "choose_examples":
        from selectune.examples.select import choose_examples

        return choose_examples
    if name == "experiment":
        import importlib

        return importlib.import_module("selectune.experiment")
    raise AttributeError(name)
