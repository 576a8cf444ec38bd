"""Scores that a base gives its own training data: the family that random selection was found hard to tell from.

Knows: the loss of a response, its ratio with and without the prompt (IFD), and how little a record adds to a compressed choice (ZIP).
Does not know: the target. Left out: a rating that the base gives in a token and how sure it is of it (SelectIT).
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from selectune.data.duplicates import content
from selectune.examples.among_answers import AmongAnswers, one_each
from selectune.examples.factors.normalise import percentile_ranks
from selectune.examples.factors.signals import ResponseLoss
from selectune.examples.factors.store import measure
from selectune.examples.longest import response_tokens
from selectune.examples.method import Array, Choice, ExampleMethod, Ranked
from selectune.examples.pool import Pool
from selectune.progress import watched

WINDOW = 1 << 15
"""Bytes that zlib looks back."""
_PAPER = "Rethinking Data Selection at Scale: Random Selection is Almost All You Need, 2024, arXiv 2410.09335"


class HighestLoss(Ranked):
    """The records whose responses the base finds hardest."""

    name: ClassVar[str] = "loss"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = _PAPER
    summary: ClassVar[str] = "The records with the highest (or lowest) response loss under the base."

    def score(self, pool: Pool) -> dict[str, Array]:
        return {"loss": measure(pool, ResponseLoss())}


def difficulty(pool: Pool) -> dict[str, Array]:
    """Return IFD, the perplexity of a response given its prompt over that of the response alone, and both losses."""
    given, alone = measure(pool, ResponseLoss()), measure(pool, ResponseLoss(conditional=False))
    return {"instruction-following difficulty": np.exp(given - alone), "loss": given, "loss without prompt": alone}


class InstructionFollowingDifficulty(Ranked):
    """The records whose prompt helps least with the response, though it helps."""

    name: ClassVar[str] = "ifd"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = (
        "From Quantity to Quality: Boosting LLM Performance with Self-Guided Data Selection, NAACL 2024, arXiv 2308.12032"
    )
    summary: ClassVar[str] = "The highest ratio of response perplexity with and without the prompt, below 1."
    departs: ClassVar[str] = "The base itself scores; the paper first tunes it on a thousand records."

    below: Annotated[float, Field(gt=0)] = 1.0
    """Records at or above it (the prompt does not help) come last."""

    def score(self, pool: Pool) -> dict[str, Array]:
        signals = difficulty(pool)
        ratio = signals["instruction-following difficulty"]
        last = -ratio if self.keep == "highest" else ratio
        return {"order": np.where(ratio < self.below, ratio, last)} | signals


class Compression(ExampleMethod):
    """Records that add least to what can be compressed away: the smallest compression ratio of all that is chosen."""

    name: ClassVar[str] = "zip"
    family: ClassVar[str] = "diversity"
    paper: ClassVar[str] = (
        "Entropy Law: The Story Behind Data Compression and LLM Performance, 2024, arXiv 2407.06645; as replicated in arXiv 2410.09335"
    )
    summary: ClassVar[str] = (
        "Greedily the record that keeps the compressed choice largest for its size (low compression ratio of the whole)."
    )
    departs: ClassVar[str] = (
        "The ratio is that of the last 32 KB of the choice, which is how far zlib looks back, with the candidate after them."
    )

    first: Annotated[int, Field(gt=0)] = 10_000
    """Candidates of the first stage, by their last known ratio."""
    second: Annotated[int, Field(gt=0)] = 200
    """Of these, candidates looked at in the second."""
    third: Annotated[int, Field(gt=0)] = 100
    """Of these, chosen one by one before the stages begin again."""

    def choose(self, pool: Pool) -> Choice:
        texts = [content(record).encode() for record in pool.records]
        ratios = np.array([self._ratio(text) for text in texts])
        at_most, picked = range(self.needed(pool)), self._picked(pool, texts, ratios.copy())
        places = [place for _, place in zip(watched(at_most, "records", pool.quiet), picked, strict=False)]
        return Choice(np.array(places, dtype=np.int64), {"compression ratio": ratios})

    def _picked(self, pool: Pool, texts: list[bytes], ratios: Array) -> Iterator[int]:
        """Yield places until no record that is left would still fit; ``ratios`` are the last known ones, and are kept so."""
        sizes = pool.tokens if self.by == "tokens" else np.ones(len(texts), dtype=np.int64)
        rank = np.empty(len(texts), dtype=np.int64)
        rank[pool.order] = np.arange(len(texts))
        open_, left, held = sizes > 0, self.budget(pool), b""
        while len(fitting := np.flatnonzero(open_ & (sizes <= left))):
            pot = fitting[np.lexsort((rank[fitting], ratios[fitting]))][: self.first]
            ratios[pot] = [self._ratio(held + texts[place]) for place in pot.tolist()]
            best = pot[np.lexsort((rank[pot], ratios[pot]))][: self.second].tolist()
            for _ in range(self.third):
                if not (best := [place for place in best if open_[place] and sizes[place] <= left]):
                    break
                place = min(best, key=lambda place: (self._ratio(held + texts[place]), rank[place]))
                yield place
                open_[place] = False
                left -= int(sizes[place])
                held = (held + texts[place])[-WINDOW:]

    @staticmethod
    def _ratio(text: bytes) -> float:
        return len(text) / max(len(zlib.compress(text, 9)), 1)


class JointRank(Ranked):
    """Difficulty and length together."""

    name: ClassVar[str] = "select2reason"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = (
        "Select2Reason: Efficient Instruction-Tuning Data Selection for Long-CoT Reasoning, 2025, arXiv 2505.17266"
    )
    summary: ClassVar[str] = "The highest joint rank of difficulty and response length."
    departs: ClassVar[str] = (
        "Difficulty is the base's loss on the response instead of a trained judge's comparison; the weight of the two ranks is ours. "
        "Equal values share a rank."
    )

    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Of length; the rest is difficulty."""
    longest: Annotated[int, Field(gt=0)] | None = None
    """Records of more tokens, prompt and response, come last; left out: those of which something would be cut."""

    def score(self, pool: Pool) -> dict[str, Array]:
        lengths, losses = response_tokens(pool), measure(pool, ResponseLoss())
        joint = self.weight * percentile_ranks(lengths) + (1 - self.weight) * percentile_ranks(losses)
        uncut, limit = replace(pool.encoder, max_length=sys.maxsize), self.longest or pool.encoder.max_length
        split = self.longest is None and pool.encoder.long_records == "split"  # long texts are, and nothing of them is cut
        cut = np.array([
            not (split and record.kind == "text") and sum(len(piece.input_ids) for piece in uncut.encode(record)) > limit
            for record in pool.records
        ])  # fmt: skip
        joint[cut] -= 2 if self.keep == "highest" else -2
        return {"joint rank": np.where(np.isfinite(losses), joint, np.nan), "response tokens": lengths, "loss": losses}


class Answers(AmongAnswers):
    """Of several answers to a question, the one that fits the base."""

    name: ClassVar[str] = "grape"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = "The Best Instruction-Tuning Data are Those That Fit, 2025, arXiv 2502.04194"
    summary: ClassVar[str] = (
        "For each question the answer that the base finds most likely; then, by the same score, as many as the budget holds."
    )
    departs: ClassVar[str] = (
        "A budget below the number of questions is the paper's plus a ranking by the same score. Wrong and repetitive answers are not dropped first."
    )

    keep: Literal["likeliest", "unlikeliest"] = "likeliest"
    """``unlikeliest`` is the control."""

    def suited(self, pool: Pool) -> tuple[Array, dict[str, Array]]:
        losses = measure(pool, ResponseLoss())
        return one_each(pool, losses if self.keep == "likeliest" else -losses), {"loss": losses}
