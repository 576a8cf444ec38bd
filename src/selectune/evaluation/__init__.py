"""Was it gained, was anything lost? Scoring, benchmarks, the target, forgetting, and the statistics of the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selectune.lazily import imported

if TYPE_CHECKING:
    from selectune.evaluation.benchmarks import benchmark_texts as benchmark_texts
    from selectune.evaluation.benchmarks import known_benchmarks as known_benchmarks
    from selectune.evaluation.benchmarks import run_benchmarks as run_benchmarks
    from selectune.evaluation.forgetting import measure_forgetting as measure_forgetting
    from selectune.evaluation.scorer import Scorer as Scorer
    from selectune.evaluation.statistics import judge as judge
    from selectune.evaluation.target import choose_metric as choose_metric
    from selectune.evaluation.target import evaluate_target as evaluate_target
    from selectune.evaluation.target import sample_answers as sample_answers

__getattr__ = imported(__name__, {  # methods compare answers, and a list of them needs no benchmark
    "benchmarks": ("benchmark_texts", "known_benchmarks", "run_benchmarks"),
    "forgetting": ("measure_forgetting",),
    "scorer": ("Scorer",),
    "statistics": ("judge",),
    "target": ("choose_metric", "evaluate_target", "sample_answers"),
})  # fmt: skip
