"""The stages that measure and say what came of it: the base, the specialist, the verdict, the report.

Knows: what is measured when, and that a base is measured once. Does not know: how (:mod:`selectune.evaluation`,
:mod:`selectune.reporting`).
"""

from __future__ import annotations

import json
from typing import Any

from selectune import __version__
from selectune.meter import Meter
from selectune.pipeline.chain import Chain
from selectune.pipeline.finishing import specialist
from selectune.run import Evaluation, Sample, fingerprint, write_atomically

_JUDGING = {"confidence", "tolerance", "require_retention"}


def measure_base(chain: Chain) -> None:
    """Measure the base, once for all runs that ask the same of it."""
    from selectune import models

    inputs = {
        "base": models.fingerprint(models.locate(chain.recipe.base), chain.recipe.base),
        "evaluation": chain.recipe.evaluation.model_dump(exclude=_JUDGING),
        "test": [record.key for record in chain.records("test")],
        "encoder": [chain.recipe.data.system, chain.recipe.data.max_length, chain.recipe.data.long_records],
        "bfloat16": chain.bfloat16,
    }
    kept = models.cache_folder() / "measurements" / f"{fingerprint({**inputs, 'version': __version__})}.json"

    def work(meter: Meter) -> None:
        """Measure the base, or take what an earlier run with the same base, test set and settings measured."""
        if not kept.exists():
            base = chain.load_base(quantised=False)  # what the user has, even where a form then holds it in 4 bits
            meter.watch(base.model, base.anatomy.total_parameters)
            measured, answers = evaluate(chain, base.model, base.tokenizer, "base")
            write_atomically(kept, json.dumps({"evaluation": measured.model_dump(mode="json"), "answers": answers}))
        values = json.loads(kept.read_text(encoding="utf-8"))
        chain.run.write("base_evaluation.json", Evaluation(**values["evaluation"]))
        chain.run.write("base_answers.json", values["answers"])

    chain.stage("measure_base", inputs, work)


def measure_specialist(chain: Chain) -> None:
    """Measure the specialist as the base was, and beside the base what it forgot."""
    from selectune import evaluation

    def work(meter: Meter) -> None:
        base, model = specialist(chain)
        tokenizer = base.tokenizer
        meter.watch(model, base.anatomy.total_parameters)
        measured, answers = evaluate(chain, model, tokenizer, "specialist")
        if chain.recipe.evaluation.forgetting:
            beside = chain.load_base(quantised=False)
            meter.watch(beside.model, beside.anatomy.total_parameters)
            before, after = evaluation.measure_forgetting(beside.model, model, tokenizer, bfloat16=chain.bfloat16)
            base_measured = chain.run.read("base_evaluation.json", Evaluation)
            kept = [item for item in base_measured.benchmarks if item.role != "forgetting"]
            chain.run.write("base_evaluation.json", Evaluation(model="base", benchmarks=kept + before))
            measured.benchmarks.extend(after)
        chain.run.write("evaluation.json", measured)
        earlier = chain.run.path("base_answers.json").read_text(encoding="utf-8")
        samples = _pair_answers(earlier, answers)
        chain.run.write("samples.json", [sample.model_dump() for sample in samples])

    chain.stage("measure_specialist", {"evaluation": chain.recipe.evaluation.model_dump(exclude=_JUDGING)}, work)


def evaluate(chain: Chain, model: Any, tokenizer: Any, name: str) -> tuple[Evaluation, list[tuple[str, str, str, str]]]:
    """Measure one model: the target, the general benchmarks, and some answers written out."""
    from selectune import evaluation

    settings = chain.recipe.evaluation
    scorer = evaluation.Scorer(model, tokenizer, bfloat16=chain.bfloat16, progress=not chain.quiet)
    encoder = chain.encoder(tokenizer)
    test = chain.records("test")
    benchmarks = []
    if settings.target != "off" and test:
        benchmarks += evaluation.evaluate_target(
            test, settings.target, scorer, encoder, settings.max_new_tokens, settings.target_items
        )
    benchmarks += evaluation.run_benchmarks(settings.benchmarks, scorer, settings.data_root, settings.items, settings.few_shot)
    answers = evaluation.sample_answers(test, scorer, encoder, settings.samples, settings.max_new_tokens)
    return Evaluation(model=name, benchmarks=benchmarks), answers


def _pair_answers(before: str, after: list[tuple[str, str, str, str]]) -> list[Sample]:
    earlier = {item[0]: item[3] for item in json.loads(before)}
    return [
        Sample(id=item, prompt=prompt, target=target, before=earlier.get(item, ""), after=answer)
        for item, prompt, target, answer in after
    ]


def judge(chain: Chain) -> None:
    """Compare before and after, and write the verdict."""
    from selectune import evaluation

    def work(meter: Meter) -> None:
        before = chain.run.read("base_evaluation.json", Evaluation)
        after = chain.run.read("evaluation.json", Evaluation)
        settings = chain.recipe.evaluation
        verdict = evaluation.judge(before, after, settings.confidence, settings.tolerance, chain.recipe.seed)
        chain.run.write("verdict.json", verdict)

    chain.stage("judge", chain.recipe.evaluation.model_dump(include=_JUDGING), work)


def report(chain: Chain) -> None:
    """Write the report."""
    from selectune.reporting import write_report

    chain.stage("report", {}, lambda meter: write_report(chain.run) and None)
    write_report(chain.run)  # once more, now with the cost of every stage
