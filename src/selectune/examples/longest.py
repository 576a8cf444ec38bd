"""The longest responses: the plain rule that is hard to beat.

Knows: response tokens as the base counts them, before anything is cut. Does not know: what the responses say.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from selectune.examples.method import Array, Ranked
from selectune.examples.pool import Pool


class Longest(Ranked):
    """The records with the most response tokens."""

    name: ClassVar[str] = "longest"
    family: ClassVar[str] = "controls"
    paper: ClassVar[str] = (
        "Long Is More for Alignment, ICML 2024, arXiv 2402.04833; Rethinking Data Selection for Supervised Fine-Tuning, 2024, arXiv 2402.06094"
    )
    summary: ClassVar[str] = "The records with the longest responses, in tokens."
    departs: ClassVar[str] = (
        "Selection only: answers are not rewritten, and nothing here trains with noise on embeddings (NEFTune), as the first paper does. "
        "Of a conversation all its answers are counted."
    )

    def score(self, pool: Pool) -> dict[str, Array]:
        return {"response tokens": response_tokens(pool)}


def response_tokens(pool: Pool) -> Array:
    """Return how many tokens each record's answers have before anything is cut, ``(records,)`` float64; of a text, all of it."""
    known: dict[str, int] = {}
    for key, record in zip(pool.keys, pool.records, strict=True):
        if key not in known:
            answers = [message.content for message in record.messages if message.role == "assistant"] or [record.text]
            known[key] = sum(len(pool.encoder.response_ids(answer)) for answer in answers)
    return np.array([known[key] for key in pool.keys], dtype=np.float64)
