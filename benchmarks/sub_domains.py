"""Is more sub-domains better? One more at a time, the same number of trained tokens, scored on all of them.

The question of "How Many Languages Make Good Multilingual Instruction Tuning?" (COLING 2025, arXiv 2404.04850) put to sub-domains: the score on those
that were trained, on similar ones that were not, and on distant ones. ``python -m benchmarks.sub_domains FILE... --steps 12`` prints Markdown.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from selectune.data import Encoder
from selectune.data.prepare import read_pool
from selectune.evaluation.exposure import best_number, by_exposure, exposure, rises
from selectune.examples import Pool
from selectune.examples.factors import divergence
from selectune.examples.factors.signals import text_of
from selectune.examples.languages import Languages
from selectune.examples.trained import trained_copy
from selectune.models import bf16_is_fast, load_base
from selectune.parameters.factors.trial import loss_on


def main() -> None:
    """Train on the first 1, 2, ... sub-domains in two orders and print the scores by exposure."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("files", nargs="+")
    asked.add_argument("--steps", type=int, default=12)
    asked.add_argument("--rate", type=float, default=1e-4)
    asked.add_argument("--records", type=int, default=60, help="of each sub-domain")
    asked.add_argument("--held", type=int, default=12, help="of each, to be scored on")
    asked.add_argument("--seed", type=int, default=0)
    given = asked.parse_args()
    whole = {name: sorted(read_pool(name, {}), key=lambda record: record.key) for name in given.files}
    held = {name: records[: given.held] for name, records in whole.items()}
    records = [record for some in whole.values() for record in some[given.held : given.held + given.records]]
    fast = bf16_is_fast()
    pool = Pool(records, lambda: load_base("smollm2-135m-instruct", dtype="auto" if fast else "float32"), lambda words: Encoder(words, 512),
                seed=given.seed, bfloat16=fast, quiet=True)  # fmt: skip
    far = distances(held)
    budget = min(int(pool.tokens[[n for n, one in enumerate(records) if one.source == name]].sum()) for name in given.files)
    print(
        f"{given.steps} steps of two sequences, {budget:,} chosen tokens, seed {given.seed}; score: probability of a right token.\n"
    )
    start = scores(pool, held, None)
    print(
        f"The base: {mean(start):.4f} over all.\n\n| order | trained | on trained | on similar | on distant | on all |\n|---|---|---|---|---|---|"
    )
    for title, order in (("as given", given.files), ("turned", given.files[::-1])):
        curve = []
        for number in range(1, len(order) + 1):
            chosen = Languages(among="source", first=tuple(order), number=number, by="tokens", count=budget).select(pool)
            model = trained_copy(pool, given.steps, given.rate, [records[place] for place in chosen.places.tolist()])
            after = scores(pool, held, model)
            curve.append(mean(after))
            by = by_exposure({name: after[name] / start[name] - 1 for name in after}, exposure(order[:number], far))
            cells = " | ".join(f"{by[one]:+.1%}" if one in by else "–" for one in ("trained", "similar", "distant"))
            print(f"| {title} | {number} | {cells} | {curve[-1]:.4f} |", flush=True)
        print(
            f"| {title} | | best with {best_number(curve)}; {'never falls' if rises(curve) else 'not monotone'} | | | |",
            flush=True,
        )


def scores(pool: Pool, held: dict[str, list[Any]], model: Any) -> dict[str, float]:
    """Return the geometric mean probability of a right token on what was held out of each sub-domain."""
    return {name: math.exp(-loss_on(pool.context(records), records, model)) for name, records in held.items()}


def distances(held: dict[str, list[Any]]) -> dict[str, dict[str, float]]:
    """Return how far the words of the sub-domains are apart (Jensen and Shannon)."""
    counts = {name: divergence.words(text_of(record, "both") for record in records) for name, records in held.items()}
    return {one: {other: divergence.jensen_shannon(*divergence.distributions(counts[one], counts[other])) for other in counts if other != one}
            for one in counts}  # fmt: skip


def mean(values: dict[str, float]) -> float:
    """Return the mean of some scores."""
    return sum(values.values()) / len(values)


if __name__ == "__main__":
    main()
