"""Which of several runs' specialists a question goes to, or the base itself.

Knows: that a run's domain is what it was trained on, that general conversations are the base's, and where a router that was made once is kept. Does
not know: how a router learns (``domain_router.py``), or how an answer is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selectune.data import Encoder, records_from_file
from selectune.data.records import Message, Record
from selectune.errors import UserError
from selectune.evaluation.probe import general_conversations
from selectune.inference.domain_router import DomainRouter, features
from selectune.models import Base, cache_folder, load_base
from selectune.progress import watched
from selectune.run import Run, fingerprint

BASE = "base"
"""What the router calls the domain of general questions."""
PROMPTS = 64
"""Of each domain, that the router learns from: the first by hash of their content."""
VERSION = 2
"""Raise it when a router would be made otherwise."""


class Among:
    """Several runs on one base, and a router over what they were trained on.

    The features of a domain's prompts are made once and the router is kept in the user's cache.

    Raises:
        UserError: the runs have different bases or one name, or one has no questions to learn from.
    """

    def __init__(self, runs: Sequence[Run], quiet: bool = False) -> None:
        self.runs = {run.name: run for run in runs}
        if len(self.runs) < len(runs) or BASE in self.runs:
            raise UserError(f"these runs cannot be told apart: {', '.join(run.name for run in runs)}",
                            expected=f"runs of different names, none of them '{BASE}'")  # fmt: skip
        if len({run.recipe.base for run in runs}) > 1:
            raise UserError(
                f"these runs have different bases: {', '.join(sorted({run.recipe.base for run in runs}))}", expected="one"
            )
        self.base: Base = load_base(runs[0].recipe.base, "fast")
        self.encoder = Encoder(self.base.tokenizer, runs[0].recipe.data.max_length, "truncate")
        self.router = self._router(quiet)

    def choose(self, question: str) -> Run | None:
        """Return the run whose domain a question is of; None: the base's.

        Raises:
            UserError: the question is empty.
        """
        if not question.strip():
            raise UserError("the question is empty", field="question")
        name = self.router.choose(features(self.base.model, [self.encoder.prompt_ids((Message("user", question),))]))[0]
        return self.runs.get(name)

    def _router(self, quiet: bool) -> DomainRouter:
        domains = {BASE: general_conversations()} | {name: _trained_on(run) for name, run in self.runs.items()}
        domains = {name: sorted(records, key=lambda record: record.key)[:PROMPTS] for name, records in domains.items()}
        what = {"base": self.base.fingerprint, "prompts": {name: [one.key for one in some] for name, some in domains.items()}}
        kept = cache_folder() / "routers" / f"{fingerprint({**what, 'version': VERSION})}.safetensors"
        if not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            learn(self.base, self.encoder, domains, quiet).save(kept.with_suffix(".new"))
            kept.with_suffix(".new").replace(kept)
        return DomainRouter.load(kept)


def learn(base: Base, encoder: Any, domains: dict[str, list[Record]], quiet: bool = False) -> DomainRouter:
    """Return a router that has learnt domains one after the other, in their order, from the questions of their records."""
    router = DomainRouter()
    for name, records in watched(domains.items(), "Learning to tell domains apart", quiet):
        router.add(name, features(base.model, [encoder.prompt_ids(record.prompt) for record in records]))
    return router


def _trained_on(run: Run) -> list[Record]:
    file = run.path("data", "train.jsonl")
    records = [record for record in records_from_file(file) if record.prompt] if file.is_file() else []
    if len(records) < 2:
        raise UserError("has too few questions to tell its domain by", file=file, expected="at least 2 records with a question")
    return records
