"""How many languages, and in which shares? The same for any sub-domains that a pool's sources are.

Knows: which languages (or sources) of a pool train, one more at a time, and how a budget is shared among them. Does not know: how a language is told.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from selectune.errors import UserError, nearest
from selectune.examples.factors.language import UNDETERMINED, language
from selectune.examples.factors.signals import text_of
from selectune.examples.factors.strata import proportional_shares
from selectune.examples.method import Array, Choice, ExampleMethod, ranked
from selectune.examples.pool import Pool


class Languages(ExampleMethod):
    """So many languages, in chosen shares, at random within each."""

    name: ClassVar[str] = "languages"
    family: ClassVar[str] = "diversity"
    paper: ClassVar[str] = (
        "How Many Languages Make Good Multilingual Instruction Tuning? A Case Study on BLOOM (Lucky 52), COLING 2025, arXiv 2404.04850"
    )
    summary: ClassVar[str] = (
        "The first so many languages (or sources) of the pool in equal or tempered shares, at random within each."
    )
    departs: ClassVar[str] = (
        "The budget stays the same however many languages share it; the paper adds each language's whole parallel set. "
        "Languages are told by script and small words."
    )

    number: Annotated[int, Field(gt=0)] | None = None
    """How many train; left out: all. One more keeps those before, so that a series shows what each adds."""
    exponent: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Shares go with the size of each, in what the budget is counted in, to this power: 0 equal, 1 as in the pool."""
    first: tuple[str, ...] = ()
    """Which come first, in this order (``en``, ``de``, ...; or sources); the others after them, the largest first."""
    among: Literal["language", "source"] = "language"
    """What the pool is divided by."""

    def choose(self, pool: Pool) -> Choice:
        labels = np.array(self.labels(pool))
        mixed = ranked(pool, pool.uniform("languages"))
        groups = {name: mixed[labels[mixed] == name] for name in sorted(set(labels.tolist()))}
        order = self.order(groups)
        kept = order[: self.number]
        counted = pool.tokens if self.by == "tokens" else np.ones(len(pool), dtype=np.int64)
        sizes = [int(counted[groups[name]].sum()) for name in kept]
        shares = proportional_shares([size**self.exponent for size in sizes], self.budget(pool), sizes)
        places = interleaved([groups[name] for name in kept], shares, counted)
        rest = [place for name in order[len(kept) :] for place in groups[name].tolist()]
        told = ", ".join(f"{name} {share:,}" for name, share in zip(kept, shares, strict=True))
        pool.notes.append(f"shares in {self.by}: {told}")
        counts = {name: float(len(own)) for name, own in groups.items()}
        return Choice(
            self.fill(pool, [*places, *rest]), {f"records of its {self.among}": np.array([counts[one] for one in labels])}
        )

    def labels(self, pool: Pool) -> list[str]:
        """Return each record's language, or source."""
        if self.among == "source":
            return [record.source for record in pool.records]
        known = {key: language(text_of(record, "both")) for key, record in zip(pool.keys, pool.records, strict=True)}
        return [known[key] for key in pool.keys]

    def order(self, groups: dict[str, Array]) -> list[str]:
        """Return the names in the order in which they join.

        Raises:
            UserError: one that is to come first is not there.
        """
        for name in self.first:
            if name not in groups:
                raise UserError(f"the pool has no {self.among} '{name}'{nearest(name, groups)}", field="examples.first",
                                expected=f"some of {', '.join(groups)}")  # fmt: skip
        rest = sorted(groups.keys() - set(self.first), key=lambda name: (name == UNDETERMINED, -len(groups[name]), name))
        return [*dict.fromkeys(self.first), *rest]


def interleaved(groups: list[Array], shares: list[int], sizes: Array) -> list[int]:
    """Return all places of some groups so that every beginning of the result is shared as the whole is; what exceeds the shares comes last.

    Args:
        shares: of each group, in what ``sizes`` counts. sizes: of each record of the pool, ``(records,)`` int64.
    """
    middles = [(np.cumsum(sizes[own]) - sizes[own] / 2) / max(share, 1e-9) for own, share in zip(groups, shares, strict=True)]
    found: list[int] = np.concatenate(groups)[np.argsort(np.concatenate(middles), kind="stable")].tolist()
    return found
