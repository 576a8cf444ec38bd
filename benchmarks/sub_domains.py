"""Is more sub-domains better? One more at a time, the same number of trained tokens, scored on all of them.

The question of "How Many Languages Make Good Multilingual Instruction Tuning?" (COLING 2025, arXiv 2404.04850) put to sub-domains: four
subjects of MATH, medicine and code, added one by one in two orders and with several seeds; the score on those that were trained, on similar
ones that were not, and on distant ones. Knows: the sub-domains and the table. Does not know: how a budget is shared (``languages``), or how
near two of them are.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.sub_domains --data-root ../shared/data
    ... --share 1/2 & ... --share 2/2        # on two cores
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from selectune.data import Encoder
from selectune.data.prepare import read_pool
from selectune.data.records import Message, Record
from selectune.evaluation.exposure import best_number, by_exposure, exposure, rises
from selectune.examples import Pool
from selectune.examples.factors import divergence
from selectune.examples.factors.learnt import trained_copy
from selectune.examples.factors.signals import text_of
from selectune.examples.languages import Languages
from selectune.models import bf16_is_fast, load_base
from selectune.parameters.factors.trial import loss_on
from selectune.run import write_atomically

RESULTS = Path(__file__).parent / "results"
SUBJECTS = ("prealgebra", "geometry", "number_theory", "counting_and_probability")
OTHERS = {
    "medquad": ("medquad/medquad.jsonl.gz", {"question": "Question", "answer": "Answer"}),
    "codealpaca": ("codealpaca/code_alpaca_2k.jsonl", {}),
}
LONGEST = 900
"""Characters of a record."""


def main() -> None:
    """Train on the first 1, 2, ... sub-domains in two orders and write the scores by exposure."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    asked.add_argument("--steps", type=int, default=12)
    asked.add_argument("--rate", type=float, default=1e-4)
    asked.add_argument("--records", type=int, default=60, help="of each sub-domain")
    asked.add_argument("--held", type=int, default=12, help="of each, to be scored on")
    asked.add_argument("--seeds", type=int, default=3)
    asked.add_argument("--share", default="1/1", help="every second row from the first one: 1/2; one process for each share")
    given = asked.parse_args()
    mine, shares = (int(number) for number in given.share.split("/"))
    whole = sub_domains(given.data_root)
    held = {name: records[: given.held] for name, records in whole.items()}
    records = [replace(record, source=name) for name, some in whole.items()
               for record in some[given.held : given.held + given.records]]  # fmt: skip
    fast = bf16_is_fast()
    base = load_base("smollm2-135m-instruct", "fast")
    pool = Pool(records, lambda: base, lambda words: Encoder(words, 512), bfloat16=fast, quiet=True)
    far = distances(held)
    budget = min(int(pool.tokens[[n for n, one in enumerate(records) if one.source == name]].sum()) for name in whole)
    settings = vars(given) | {"data_root": "", "budget": budget, "order": list(whole), "bfloat16": fast}
    settings.pop("share")
    values = begun(settings) or {"settings": settings, "base": scores(pool, held, None), "rows": []}
    orders = {"as listed": list(whole), "turned": list(whole)[::-1]}
    wanted = list(itertools.product(orders, range(1, len(whole) + 1), range(given.seeds)))
    done = {(row["order"], row["number"], row["seed"]) for row in values["rows"]}
    for title, number, seed in [one for one in wanted[mine - 1 :: shares] if one not in done]:
        order, own = orders[title], replace(pool, seed=seed)
        chosen = Languages(among="source", first=tuple(order), number=number, by="tokens", count=budget).select(own)
        model = trained_copy(own, given.steps, given.rate, [records[place] for place in chosen.places.tolist()])
        after = scores(pool, held, model)
        by = by_exposure({name: after[name] / values["base"][name] - 1 for name in after}, exposure(order[:number], far))
        values = begun(settings) or values  # another share may have written meanwhile
        values["rows"].append({"order": title, "number": number, "seed": seed, "scores": after, "by": by})
        values["rows"].sort(key=lambda row: wanted.index((row["order"], row["number"], row["seed"])))
        write_atomically(RESULTS / "sub_domains.json", json.dumps(values, indent=1))
        write_atomically(RESULTS / "sub_domains.md", page(values))
        print(title, number, seed, by, flush=True)


def begun(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return what an earlier call with the same settings has left; None where there is nothing."""
    file = RESULTS / "sub_domains.json"
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"settings": None}
    return values if values["settings"] == settings else None


def sub_domains(root: Path) -> dict[str, list[Record]]:
    """Return the records of each sub-domain by hash of their content, the longest left out."""
    with gzip.open(root / "math/math_test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = {
        name: [Record("chat", (Message("user", row["context"]), Message("assistant", row["chain_of_thought"])))
               for row in rows if row["category"] == name]
        for name in SUBJECTS
    }  # fmt: skip
    found |= {name: read_pool(str(root / file), columns) for name, (file, columns) in OTHERS.items()}
    return {
        name: sorted((one for one in some if len(one.question) + len(one.response) <= LONGEST), key=lambda one: one.key)
        for name, some in found.items()
    }


def scores(pool: Pool, held: dict[str, list[Record]], model: Any) -> dict[str, float]:
    """Return the geometric mean probability of a right token on what was held out of each sub-domain."""
    return {name: math.exp(-loss_on(pool.context(records), records, model)) for name, records in held.items()}


def distances(held: dict[str, list[Record]]) -> dict[str, dict[str, float]]:
    """Return how far the words of the sub-domains are apart (Jensen and Shannon)."""
    counts = {name: divergence.words(text_of(record, "both") for record in records) for name, records in held.items()}
    return {one: {other: divergence.jensen_shannon(*divergence.distributions(counts[one], counts[other])) for other in counts if other != one}
            for one in counts}  # fmt: skip


def page(values: dict[str, Any]) -> str:
    """Return the table in words and Markdown."""
    settings, rows, start = values["settings"], values["rows"], values["base"]
    lines = [
        "# Is more sub-domains better?", "",
        f"Sub-domains: {', '.join(settings['order'])}, one more at a time, always {settings['budget']:,} trained tokens in equal shares, "
        f"{settings['steps']} steps of full fine-tuning at {settings['rate']:g}, {settings['seeds']} seeds; {settings['held']} other records of "
        "each are scored. Score: the probability of a right token (geometric mean), against the base's; after ± the standard deviation over "
        "seeds. Of what was not trained, the half whose words are nearer to what was is *similar*, the other *distant*.", "",
        f"The base: {np.mean(list(start.values())):.4f} over all.", "",
        "| order | trained | on trained | on similar | on distant | over all |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    verdicts, nearer = [], []
    for title in dict.fromkeys(row["order"] for row in rows):
        curve = []
        for number in range(1, len(settings["order"]) + 1):
            some = [row for row in rows if (row["order"], row["number"]) == (title, number)]
            if not some:
                continue
            cells = [_shown([row["by"][one] for row in some if one in row["by"]]) for one in ("trained", "similar", "distant")]
            over = [float(np.mean(list(row["scores"].values()))) for row in some]
            curve.append(float(np.mean(over)))
            lines.append(f"| {title} | {number} | {' | '.join(cells)} | {curve[-1]:.4f} ± {np.std(over):.4f} |")
            nearer += [
                row["by"]["similar"] > row["by"]["distant"] for row in some if "distant" in row["by"] and "similar" in row["by"]
            ]
        shape = "never falling" if rises(curve) else "not monotone"
        verdicts.append(f"{title}: best over all with {best_number(curve)}, {shape}")
    missing = 2 * len(settings["order"]) * settings["seeds"] - len(rows)
    if missing:
        verdicts.append(f"{missing} trainings are not run yet")
    return "\n".join([*lines, "", "; ".join(verdicts) + f". Similar ones gained more than distant ones in {sum(nearer)} of {len(nearer)} "
                      "trainings where there were both.", ""])  # fmt: skip


def _shown(values: list[float]) -> str:
    return f"{np.mean(values):+.1%} ± {np.std(values):.1%}" if values else "–"


if __name__ == "__main__":
    main()
