"""From files to a table: which of several sources helps a target, and how far the rankings can be trusted.

Knows: how sources and target are read, ranked and, where asked for, tried. Does not know: how a source is compared with a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from selectune.errors import UserError, nearest
from selectune.examples.sources import CHEAP, NONE, Ranker, Trying, distances, transfer


@dataclass
class Ranking:
    """Sources in the order of one ranker."""

    by: str
    distances: dict[str, float]
    regret: dict[int, float] = field(default_factory=dict)
    """k -> Regret@k in per cent, where transfer was measured."""
    ndcg: float | None = None

    @property
    def order(self) -> list[str]:
        """Names, the nearest first."""
        return sorted(self.distances, key=lambda name: (self.distances[name], name))


@dataclass
class Ranked:
    """What is known of some sources."""

    records: dict[str, int]
    rankings: list[Ranking]
    transfer: dict[str, float] = field(default_factory=dict)
    """Source -> probability of the target's held half after training on it, where that was tried."""
    notes: list[str] = field(default_factory=list)


def rank_sources(
    sources: Sequence[str],
    target: str | list[str],
    *,
    by: Sequence[str] = ("mmd",),
    steps: int = 0,
    sample: int = 500,
    base: str = "smollm2-135m-instruct",
    columns: dict[str, str] | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Ranked:
    """Rank sources by how much they promise for a target.

    Args:
        sources: files, folders, globs or hub ids, each a source. by: rankers, or ``all`` for those that train nothing. steps: of a short training on
            each source; above 0, what each brings is measured too, and each ranking is judged by it. sample: records of each that are looked at.

    Raises:
        UserError: a mistake in the input, an unknown ranker.
    """
    from selectune.data import Encoder
    from selectune.data.prepare import read_pool
    from selectune.evaluation.ranking import ndcg, regret_at
    from selectune.examples.pool import Pool
    from selectune.models import bf16_is_fast, load_base

    rankers = _rankers(by)
    if len(set(sources)) < len(sources):
        raise UserError("a source is named twice", field="sources", expected="each once")
    whole = {name: read_pool(name, columns or {}, "sources") for name in sources}
    wanted = _first(read_pool(target, columns or {}, "target"), sample)
    fast = bf16_is_fast()
    pool = Pool([], lambda: load_base(base, "fast"), lambda words: Encoder(words, 512), wanted, seed,
                bfloat16=fast, quiet=quiet)  # fmt: skip
    some = {name: _first(records, sample) for name, records in whole.items()}
    trying = Trying(steps=steps or Trying.steps)
    found = Ranked({name: len(records) for name, records in whole.items()}, [])
    for ranker in rankers:
        looked = whole if ranker == "size" else some
        found.rankings.append(Ranking(ranker, distances(pool, looked, wanted, ranker, trying=trying)))
    if steps:
        found.transfer = transfer(pool, some, wanted, Trying(steps=steps, target_steps=steps))
        alone = found.transfer[NONE]
        performance = {name: value for name, value in found.transfer.items() if name != NONE}
        for ranking in found.rankings:
            ranking.regret = {k: regret_at(k, ranking.order, performance) for k in (1, 3) if k < len(performance) or k == 1}
            ranking.ndcg = ndcg(ranking.order, {name: value - alone for name, value in performance.items()})
        if alone >= max(performance.values()):
            found.notes.append("No source is better than training on the target alone.")
    return found


def _rankers(by: Sequence[str]) -> list[str]:
    known = get_args(Ranker)
    asked = [one for name in by for one in (CHEAP if name == "all" else (name,))]
    for name in asked:
        if name not in known:
            raise UserError(
                f"unknown ranker '{name}'{nearest(name, known)}", field="--by", expected=f"all, or some of {', '.join(known)}"
            )
    return list(dict.fromkeys(asked))


def _first(records: list[Any], count: int) -> list[Any]:
    return sorted(records, key=lambda record: record.key)[:count]
