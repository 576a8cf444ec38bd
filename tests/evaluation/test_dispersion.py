"""Dispersion over sub-domains: the lines of the definition, by hand."""

import math
import statistics

import pytest

from selectune.evaluation.dispersion import OTHERS, dispersion, dispersions
from selectune.run import Benchmark, Item


def ones(right, of):
    return [1.0] * right + [0.0] * (of - right)


def test_the_numbers_are_those_of_the_definition():
    found = dispersion("exam", {"law": ones(9, 10), "water": ones(5, 20), "soil": ones(12, 20)})
    scores = [0.9, 0.25, 0.6]
    assert list(found.scores.values()) == pytest.approx(scores)
    assert found.mean == pytest.approx(statistics.fmean(scores))
    assert found.deviation == pytest.approx(statistics.pstdev(scores))
    assert found.variation == pytest.approx(statistics.pstdev(scores) / statistics.fmean(scores))
    assert found.index == pytest.approx(found.mean * (1 - found.variation))


def test_a_row_of_the_papers_table():
    """baichuan2-13b-chat: mean 83.63, deviation 10.39, index 73.24."""
    found = dispersion("exam", {"low": [0.8363 - 0.1039] * 10, "high": [0.8363 + 0.1039] * 10})
    assert 100 * found.index == pytest.approx(73.24, abs=0.01) and round(found.variation, 2) == 0.12


def test_a_common_factor_changes_nothing_and_equal_scores_are_even():
    values = {"a": ones(3, 10), "b": ones(6, 10), "c": ones(9, 12)}
    half = {name: [value / 2 for value in inside] for name, inside in values.items()}
    assert dispersion("exam", half).variation == pytest.approx(dispersion("exam", values).variation)
    even = dispersion("exam", {"a": ones(5, 10), "b": ones(10, 20)})
    assert even.variation == 0 and even.index == even.mean == 0.5
    assert math.isnan(dispersion("exam", {"a": ones(0, 10), "b": ones(0, 10)}).variation)
    assert (
        dispersion("exam", {"a": ones(10, 10), "b": ones(0, 10), "c": ones(0, 10)}).index is None
    )  # varies by more than its mean


def test_small_sub_domains_are_put_together():
    values = {"large": ones(5, 10), "small": ones(6, 6), "tiny": ones(0, 6)}
    found = dispersion("exam", values)
    assert found.scores == {"large": 0.5, OTHERS: 0.5} and found.items == {"large": 10, OTHERS: 12}
    assert dispersion("exam", {"large": ones(5, 10), "small": ones(6, 6)}) is None  # one alone does not spread
    assert dispersion("exam", {}) is None


def test_chance_explains_what_few_items_show():
    found = dispersion("exam", {str(number): ones(5, 10) for number in range(6)})
    assert found.by_chance == pytest.approx(math.sqrt(0.25 / 10))


def benchmark(name, metric, items, higher=True, **settings):
    return Benchmark(name=name, role="general", metric=metric, higher_is_better=higher, score=0.0, settings=settings,
                     items=[Item(id=key, value=value) for key, value in items])  # fmt: skip


def test_sub_domains_are_found_in_tasks_and_in_areas():
    tasks = ["mmlu_law", "mmlu_law_of_sea"]
    items = [(f"mmlu_law-{n}", 1.0) for n in range(10)] + [(f"mmlu_law_of_sea-{n}", float(n % 2)) for n in range(10)]
    group = benchmark("mmlu", "accuracy", items, tasks=tasks)
    areas = [benchmark(f"probe/{area}", "accuracy_normalised", [(f"{area}{n}", float(n < right)) for n in range(10)])
             for area, right in (("sums", 2), ("words", 8))]  # fmt: skip
    probe = benchmark("probe", "accuracy_normalised", [("x", 1.0)])
    losses = benchmark("probe/answer_nll", "answer_nll", [(str(n), 2.0) for n in range(10)], higher=False)
    alone = benchmark("hellaswag", "accuracy", [(f"hellaswag-{n}", 1.0) for n in range(20)], tasks=["hellaswag"])
    found = dispersions([group, probe, *areas, losses, alone])
    assert [(one.benchmark, one.scores) for one in found] == [
        ("mmlu", {"mmlu_law": 1.0, "mmlu_law_of_sea": 0.5}), ("probe", {"sums": 0.2, "words": 0.8}),
    ]  # fmt: skip


def test_the_report_shows_sub_domains_before_and_after(tmp_path):
    from selectune import recipe
    from selectune.reporting import write_report
    from selectune.run import Evaluation, Run, Verdict

    def evaluation(rights):
        areas = [benchmark(f"probe/{area}", "accuracy_normalised", [(f"{area}{n}", float(n < right)) for n in range(10)])
                 for area, right in rights.items()]  # fmt: skip
        return Evaluation(model="m", benchmarks=[benchmark("probe", "accuracy_normalised", [("x", 1.0)]), *areas])

    run = Run.create(tmp_path / "run", recipe.parse({"data": {"train": "x.jsonl"}}))
    run.write("base_evaluation.json", evaluation({"sums": 2, "words": 8}))
    run.write("evaluation.json", evaluation({"sums": 5, "words": 6}))
    run.write("verdict.json", Verdict(gained="not measured", retained="not measured", headline="", differences=[], confidence=0.95,
                                      tolerance=0.03))  # fmt: skip
    page = write_report(run).read_text()
    assert "sums 20.0 → 50.0 % (10)" in page and "0.60 → 0.09" in page
    run.path("evaluation.json").unlink()
    assert "Over sub-domains" not in write_report(run).read_text()
