"""Selectune: selective fine-tuning of small language models, with proof that nothing else was lost."""

from __future__ import annotations

__version__ = "0.1.0"
