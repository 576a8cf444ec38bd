"""The first stage: records are read, cleaned and split.

Knows: that every wrong choice is told before any work. Does not know: what is done to the data (:mod:`selectune.data`).
"""

from __future__ import annotations

from selectune.meter import Meter
from selectune.pipeline.chain import Chain
from selectune.run import DataSummary


def prepare(chain: Chain) -> None:
    """Write the splits and the account of the data, and show it."""
    from selectune import data, evaluation, models
    from selectune.reporting.terminal import show_data

    settings = chain.recipe.evaluation

    def work(meter: Meter) -> None:
        catalogue_of_choices = (
            chain.recipe.examples is None or chain.examples,
            chain.form,
            chain.parameters,
            chain.objective,
            chain.policy,
            chain.finishing,
        )  # a wrong choice, or a file that it names and that is not there, is told before any work
        assert all(catalogue_of_choices) and chain.other_records is not None
        chain.run.write("environment.json", models.environment())
        texts = evaluation.benchmark_texts(settings.benchmarks, settings.data_root, settings.items)
        prepared = data.prepare(chain.recipe.data, texts, seed=chain.recipe.seed)
        for split in ("train", "dev", "test"):
            data.records_to_file(getattr(prepared, split), chain.run.path("data", f"{split}.jsonl"))
        chain.run.write("data.json", prepared.summary)

    hashes = data.input_hashes(chain.recipe.data)
    told = chain.recipe.data.model_dump(exclude={"engine"})  # where signals are measured changes none
    ran = chain.stage("prepare", {"data": told, "hashes": hashes, "e": settings.benchmarks}, work)
    if ran and not chain.quiet:
        show_data(chain.run.read("data.json", DataSummary))
