"""Was it gained, was anything lost? Scoring, benchmarks, the target, forgetting, and the statistics of the verdict."""

from selectune.evaluation.benchmarks import benchmark_texts, known_benchmarks, run_benchmarks
from selectune.evaluation.forgetting import measure_forgetting
from selectune.evaluation.scorer import Scorer
from selectune.evaluation.statistics import judge
from selectune.evaluation.target import choose_metric, evaluate_target, sample_answers

__all__ = [
    "Scorer", "benchmark_texts", "choose_metric", "evaluate_target", "judge", "known_benchmarks", "measure_forgetting",
    "run_benchmarks", "sample_answers",
]  # fmt: skip
