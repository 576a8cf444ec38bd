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
    departs: ClassVar[str] = "Selection only: the papers' later rewriting of answers and noise on embeddings are other axes."

    def score(self, pool: Pool) -> dict[str, Array]:
        lengths = {}
        for key, record in zip(pool.keys, pool.records, strict=True):
            if key not in lengths:
                lengths[key] = len(pool.encoder.response_ids(record.response))
        return {"response tokens": np.array([lengths[key] for key in pool.keys], dtype=np.float64)}
