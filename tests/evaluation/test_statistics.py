"""The statistics keep what they promise: checked by simulation and by hand."""

import numpy as np
import pytest
from scipy import stats

from selectune.evaluation import statistics as s
from selectune.run import Benchmark, Evaluation, Item


def evaluation(model, **values):
    benchmarks = []
    for name, numbers in values.items():
        items = [Item(id=f"{name}{i}", value=float(v)) for i, v in enumerate(numbers)]
        role = "target" if name == "target" else "general"
        benchmarks.append(Benchmark(name=name, role=role, metric="accuracy", higher_is_better=True, items=items,
                                    score=float(np.mean(numbers))))  # fmt: skip
    return Evaluation(model=model, benchmarks=benchmarks)


def flips(generator, count, to_right, to_wrong, base=0.5):
    before = (generator.random(count) < base).astype(float)
    draw = generator.random(count)
    after = before.copy()
    after[(before == 0) & (draw < to_right / (1 - base))] = 1
    after[(before == 1) & (draw < to_wrong / base)] = 0
    return before, after


def test_bootstrap_intervals_cover_the_truth():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        before, after = flips(generator, 200, 0.10, 0.05)
        low, high = s.paired_bootstrap(before, after, 0.95, resamples=1000)
        covered += low <= 0.05 <= high
    assert 0.90 <= covered / 300 <= 0.985


def test_mcnemar_is_the_exact_binomial_test():
    for right, wrong in [(0, 0), (3, 9), (10, 10), (0, 6), (40, 22)]:
        expected = 1.0 if right + wrong == 0 else stats.binomtest(right, right + wrong).pvalue
        assert s.mcnemar(right, wrong) == pytest.approx(expected)


def test_holm_by_hand():
    assert s.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_sign_flip_finds_a_shift_and_not_noise():
    generator = np.random.default_rng(1)
    noise = generator.normal(0, 1, 200)
    assert s.sign_flip(np.zeros(200), noise + 0.5) < 0.01
    assert s.sign_flip(np.zeros(200), noise - noise.mean()) > 0.5


def test_power_at_the_smallest_detectable_drop():
    generator = np.random.default_rng(2)
    before, after = flips(generator, 4000, 0.05, 0.05)
    drop = s.smallest_detectable_drop(before[:400], after[:400])
    seen = 0
    for _ in range(300):
        b, a = flips(generator, 400, 0.05, 0.05 + drop)
        seen += s.mcnemar(int((a > b).sum()), int((a < b).sum())) < 0.05
    assert 0.6 <= seen / 300 <= 0.92


def test_false_alarms_stay_below_the_level_over_all_benchmarks():
    generator = np.random.default_rng(3)
    alarms = 0
    for trial in range(100):
        pairs = {name: flips(generator, 150, 0.06, 0.06) for name in ("a", "b", "c", "d")}
        before = evaluation("base", **{name: pair[0] for name, pair in pairs.items()})
        after = evaluation("specialist", **{name: pair[1] for name, pair in pairs.items()})
        alarms += s.judge(before, after, seed=trial).retained == "lost"
    assert alarms <= 10


def test_verdicts():
    generator = np.random.default_rng(4)
    target = flips(generator, 200, 0.4, 0.01)
    same = flips(generator, 2000, 0.01, 0.01)
    fallen = flips(generator, 400, 0.01, 0.2)
    few = flips(generator, 20, 0.1, 0.1)
    cases = {"nothing lost": same, "lost": fallen, "too few items to say": few}
    for expected, (before, after) in cases.items():
        verdict = s.judge(evaluation("base", target=target[0], general=before),
                          evaluation("specialist", target=target[1], general=after))  # fmt: skip
        assert (verdict.gained, verdict.retained) == ("gained", expected)
        assert verdict == s.judge(evaluation("base", target=target[0], general=before),
                                  evaluation("specialist", target=target[1], general=after))  # fmt: skip


def test_items_must_be_the_same():
    before, after = evaluation("base", a=[1, 0]), evaluation("specialist", a=[1, 0])
    after.benchmarks[0].items[1].id = "other"
    with pytest.raises(ValueError, match="a1 and other"):
        s.judge(before, after)
