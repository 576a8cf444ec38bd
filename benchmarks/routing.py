"""Whose question is this? The router of ``selectune ask --among`` on real domains, beside the nearest mean and the nearest neighbours.

The claim of SOYO (arXiv 2505.23744) in miniature: mixtures and a classifier that learns domain after domain find the domain of a prompt at least as
often as the nearest mean and as neighbours that need every prompt to be kept. Knows: the domains and how accuracy is counted. Does not know:
how a router learns.

python -m benchmarks.routing --data-root ../shared/data
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from selectune.data import Encoder, Message
from selectune.data.prepare import read_pool
from selectune.data.records import Record
from selectune.evaluation.probe import general_conversations, load_general_prompts
from selectune.inference.among import BASE, PROMPTS
from selectune.inference.domain_router import DomainRouter, features
from selectune.models import load_base
from selectune.run import write_atomically

RESULTS = Path(__file__).parent / "results"
DOMAINS = {
    "gsm8k": ("gsm8k/train.jsonl.gz", {"question": "question", "answer": "answer"}),
    "medquad": ("medquad/medquad.jsonl.gz", {"question": "Question", "answer": "Answer"}),
    "medqa_usmle": ("medqa_usmle/train_sample.jsonl.gz", {}),
    "codealpaca": ("codealpaca/code_alpaca_2k.jsonl", {}),
    "dolly": ("dolly/dolly_3k.jsonl.gz", {}),
    "financial_phrasebank": ("financial_phrasebank/all-data.csv", {}),
}
HELD = 40


def main() -> None:
    """Learn from the first prompts of each domain, ask with the next, and write the table."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    given = asked.parse_args()
    base = load_base("smollm2-135m-instruct", "fast")
    encoder = Encoder(base.tokenizer, 256, "truncate")
    learnt, held = {}, {}
    begin = time.perf_counter()
    for name in (BASE, *DOMAINS):
        records = [] if name == BASE else read_pool(str(given.data_root / DOMAINS[name][0]), DOMAINS[name][1])
        records = sorted((one for one in records if one.prompt), key=lambda one: one.key)
        if name == BASE:  # asked are the prompts that drift is measured on, which no run learns from
            records = general_conversations()[:PROMPTS] + [
                Record("chat", (Message("user", one.prompt), Message("assistant", one.response)))
                for one in load_general_prompts()
            ]
        found = features(base.model, [encoder.prompt_ids(one.prompt)[:256] for one in records[: PROMPTS + HELD]])
        learnt[name], held[name] = found[:PROMPTS], found[PROMPTS:]
        print(f"{name}: {len(learnt[name])} learnt, {len(held[name])} held out, {time.perf_counter() - begin:.0f} s", flush=True)
    rows = {}
    for seed in range(3):
        router = DomainRouter(seed=seed)
        begin = time.perf_counter()
        for name, values in learnt.items():
            router.add(name, values)
        rows[f"router, seed {seed}"] = {name: _right(router.choose(values), name) for name, values in held.items()}
        seconds = time.perf_counter() - begin
    known = {name: router.reduce(values) for name, values in learnt.items()}
    names = list(known)
    means = torch.stack([values.mean(0) for values in known.values()])
    every, whose = torch.cat(list(known.values())), [name for name, values in known.items() for _ in values]
    rows["nearest mean"], rows["five nearest prompts, all kept"] = {}, {}
    for name, values in held.items():
        points = router.reduce(values)
        rows["nearest mean"][name] = _right([names[place] for place in torch.cdist(points, means).argmin(1).tolist()], name)
        near = torch.cdist(points, every).topk(5, largest=False).indices.tolist()
        votes = [[whose[place] for place in row] for row in near]
        rows["five nearest prompts, all kept"][name] = _right(
            [max(row, key=lambda one: (row.count(one), -row.index(one))) for row in votes], name
        )
    write_atomically(
        RESULTS / "routing.json",
        json.dumps({"rows": rows, "held": {n: len(v) for n, v in held.items()}, "seconds": seconds}, indent=1),
    )
    write_atomically(RESULTS / "routing.md", _page(rows, {name: len(values) for name, values in held.items()}, seconds))


def _right(found: list[str], name: str) -> float:
    return sum(one == name for one in found) / max(len(found), 1)


def _page(rows: dict[str, dict[str, float]], held: dict[str, int], seconds: float) -> str:
    names = list(held)
    lines = ["# Whose question is this?", "", "The router of `selectune ask --among` (SOYO, CVPR 2025, arXiv 2505.23744) on real domains.",
             f"The built-in base; {PROMPTS} prompts of each domain are learnt, in this order; learning from features takes {seconds:.1f} s. "
             "Share of held-out prompts whose domain is found.", "",
             f"| | {' | '.join(names)} | mean |", f"|---|{'---|' * (len(names) + 1)}",
             f"| held-out prompts | {' | '.join(str(held[name]) for name in names)} | |"]  # fmt: skip
    for title, row in rows.items():
        lines.append(f"| {title} | {' | '.join(f'{row[name]:.1%}' for name in names)} | {sum(row.values()) / len(row):.1%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
