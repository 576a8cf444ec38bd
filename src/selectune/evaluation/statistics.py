"""Is a difference real, and could a loss have been seen at all?

Knows: paired intervals (bootstrap over items), tests (exact McNemar for right-or-wrong items, sign flips otherwise), Holm's
correction over the general benchmarks, the smallest drop that so many items would show, and from these the verdict.
Does not know: what a benchmark asks.

The verdict on one general benchmark:

- *lost*: it fell, and the corrected p-value is below 1 - confidence.
- *nothing lost*: not lost, and the interval, at the corrected level, excludes a drop beyond the tolerance.
- *too few items to say*: neither.

Overall: *lost* if any is lost, or if mean cross-entropy on general text rose significantly and by more than 0.10 nats per
token; *nothing lost* if each is, or if none is lost and their items pooled exclude a mean drop beyond the tolerance;
otherwise *too few items to say*. Areas within a benchmark (names with a slash) are shown and not counted again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import stats

from selectune.run import Benchmark, Difference, Evaluation, Verdict

RESAMPLES = 10_000
CROSS_ENTROPY_LIMIT = 0.10
DRIFT = "forgetting/cross_entropy"
"""Nats per token. PEFT's method comparison spans +0.02 to +0.22: below it lie LoRA (+0.05) and full fine-tuning (+0.03), at and
above it the methods that it shows to forget."""
PLANNING_DISCORDANCE = 0.05
"""Share of items that flip, assumed where none did."""

Array = np.ndarray


def paired_bootstrap(
    before: Array, after: Array, confidence: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the percentile interval of the mean difference, items drawn in pairs with replacement."""
    differences = np.asarray(after, float) - np.asarray(before, float)
    if np.allclose(differences, differences[0]):
        return float(differences.mean()), float(differences.mean())
    generator = np.random.default_rng(seed)
    count = len(differences)
    means = np.empty(resamples)
    for start in range(0, resamples, 500):
        draws = generator.integers(0, count, (min(500, resamples - start), count))
        means[start : start + 500] = differences[draws].mean(1)
    tail = (1 - confidence) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


def paired_f1_bootstrap(before: Benchmark, after: Benchmark, confidence: float, seed: int) -> tuple[float, float]:
    """Return the percentile interval of a difference of macro-F1, by resampling items."""
    from selectune.evaluation.target import macro_f1

    generator = np.random.default_rng(seed)
    wanted = np.array([item.target for item in before.items])
    predictions = [np.array([item.prediction for item in side.items]) for side in (before, after)]
    found = []
    for _ in range(1000):
        draw = generator.integers(0, len(wanted), len(wanted))
        scores = [macro_f1(list(side[draw]), list(wanted[draw])) for side in predictions]
        found.append(scores[1] - scores[0])
    tail = (1 - confidence) / 2
    return float(np.quantile(found, tail)), float(np.quantile(found, 1 - tail))


def mcnemar(to_right: int, to_wrong: int) -> float:
    """Return the exact two-sided p-value of so many flips each way."""
    flips = to_right + to_wrong
    return 1.0 if not flips else float(stats.binomtest(to_right, flips, 0.5).pvalue)


def sign_flip(before: Array, after: Array, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Return the two-sided p-value of a mean difference, by flipping the signs of the items' differences."""
    differences = np.asarray(after, float) - np.asarray(before, float)
    observed = abs(differences.mean())
    if observed == 0:
        return 1.0
    generator = np.random.default_rng(seed)
    reached = 0
    for start in range(0, resamples, 500):
        signs = generator.choice([-1.0, 1.0], (min(500, resamples - start), len(differences)))
        reached += int((abs((signs * differences).mean(1)) >= observed - 1e-12).sum())
    return (reached + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's corrected p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def smallest_detectable_drop(before: Array, after: Array, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the smallest mean drop that so many paired items would show, by the normal approximation.

    The spread of the differences is the one observed; where nothing flipped, that of 5 % of items flipping.
    """
    differences = np.asarray(after, float) - np.asarray(before, float)
    variance = float(differences.var(ddof=1)) if len(differences) > 1 else 0.0
    variance = variance or PLANNING_DISCORDANCE
    quantiles = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    return float(quantiles * math.sqrt(variance / max(len(differences), 1)))


def judge(before: Evaluation, after: Evaluation, confidence: float = 0.95, tolerance: float = 0.03, seed: int = 0) -> Verdict:
    """Compare two evaluations, benchmark by benchmark, and say what was gained and whether anything was lost.

    Raises:
        ValueError: the two do not hold the same items.
    """
    pairs = [_pair(first, after) for first in before.benchmarks]
    counted = [first.name for first, _ in pairs if first.role == "general" and "/" not in first.name]
    level = 1 - (1 - confidence) / max(len(counted), 1)
    differences = []
    for first, second in pairs:
        used = level if first.name in counted else confidence
        differences.append(_difference(first, second, confidence, used, seed))
    by_name = {difference.benchmark: difference for difference in differences}
    corrected = holm([by_name[name].p_value or 1.0 for name in counted])
    for name, p_corrected in zip(counted, corrected, strict=True):
        by_name[name].p_corrected = p_corrected
    arrays = {first.name: _values(first, second) for first, second in pairs}
    for difference in differences:
        difference.verdict = _say(difference, arrays[difference.benchmark], difference.benchmark in counted, level, confidence,
                                  tolerance, seed)  # fmt: skip
    gained = _gained(by_name)
    retained = _retained([by_name[name] for name in counted], by_name, arrays, confidence, tolerance, seed)
    return Verdict(gained=gained, retained=retained, headline=_headline(gained, retained, by_name, counted, confidence, tolerance),
                   differences=differences, confidence=confidence, tolerance=tolerance)  # fmt: skip


def _pair(first: Benchmark, after: Evaluation) -> tuple[Benchmark, Benchmark]:
    second = next((other for other in after.benchmarks if other.name == first.name), None)
    if second is None:
        raise ValueError(f"benchmark {first.name} was not measured on {after.model}")
    ids = [item.id for item in first.items], [item.id for item in second.items]
    if ids[0] != ids[1]:
        wrong = next((pair for pair in zip(*ids) if pair[0] != pair[1]), (len(ids[0]), len(ids[1])))
        raise ValueError(f"benchmark {first.name} has other items before and after: {wrong[0]} and {wrong[1]}")
    return first, second


def _values(first: Benchmark, second: Benchmark) -> tuple[Array, Array]:
    return np.array([item.value for item in first.items]), np.array([item.value for item in second.items])


def _difference(first: Benchmark, second: Benchmark, confidence: float, level: float, seed: int) -> Difference:
    before, after = _values(first, second)
    binary = first.metric not in ("answer_nll", "cross_entropy", "kl", "top1_agreement")
    to_right, to_wrong = int((after > before).sum()), int((after < before).sum())
    if first.metric == "macro_f1":
        low, high = paired_f1_bootstrap(first, second, confidence, seed)
    else:
        low, high = paired_bootstrap(before, after, confidence, seed)
    return Difference(
        benchmark=first.name, role=first.role, metric=first.metric, higher_is_better=first.higher_is_better,
        items=len(before), before=first.score, after=second.score, difference=second.score - first.score, low=low, high=high,
        p_value=mcnemar(to_right, to_wrong) if binary else sign_flip(before, after, seed),
        smallest_detectable_drop=smallest_detectable_drop(before, after, 1 - level),
        flipped_to_right=to_right if binary else 0, flipped_to_wrong=to_wrong if binary else 0, verdict="measured",
    )  # fmt: skip


def _say(
    difference: Difference, values: tuple[Array, Array], counted: bool, level: float, confidence: float, tolerance: float,
    seed: int,
) -> Literal["gained", "nothing lost", "lost", "too few items to say", "no clear gain", "measured"]:  # fmt: skip
    sign = 1 if difference.higher_is_better else -1
    if difference.role == "target":
        if (difference.p_value or 1.0) < 1 - confidence:
            return "gained" if sign * difference.difference > 0 else "lost"
        return "no clear gain"
    if difference.benchmark == DRIFT:
        return "lost" if difference.low > 0 and difference.difference > CROSS_ENTROPY_LIMIT else "measured"
    if not counted:
        return "measured"
    if (difference.p_corrected or 1.0) < 1 - confidence and sign * difference.difference < 0:
        return "lost"
    if not difference.flipped_to_right and not difference.flipped_to_wrong:  # nothing changed: the rule of three
        bound = -math.log(1 - level) / difference.items
        return "nothing lost" if bound <= tolerance else "too few items to say"
    low, high = paired_bootstrap(*values, confidence=level, seed=seed)
    worst = low if sign > 0 else -high
    return "nothing lost" if worst >= -tolerance else "too few items to say"


def _gained(by_name: dict[str, Difference]) -> Literal["gained", "no clear gain", "lost", "not measured"]:
    target = by_name.get("target")
    if target is None:
        return "not measured"
    return target.verdict if target.verdict in ("gained", "lost") else "no clear gain"  # type: ignore[return-value]


def _retained(
    general: list[Difference], by_name: dict[str, Difference], arrays: dict[str, tuple[Array, Array]], confidence: float,
    tolerance: float, seed: int,
) -> Literal["nothing lost", "lost", "too few items to say", "not measured"]:  # fmt: skip
    if any(difference.verdict == "lost" for difference in [*general, *(by_name[name] for name in (DRIFT,) if name in by_name)]):
        return "lost"
    if not general:
        return "not measured"
    if all(difference.verdict == "nothing lost" for difference in general):
        return "nothing lost"
    pooled = [arrays[difference.benchmark] for difference in general if difference.higher_is_better]
    before, after = (np.concatenate([pair[side] for pair in pooled]) for side in (0, 1))
    low, _ = paired_bootstrap(before, after, confidence, seed)
    return "nothing lost" if low >= -tolerance else "too few items to say"


def _headline(
    gained: str, retained: str, by_name: dict[str, Difference], counted: list[str], confidence: float, tolerance: float
) -> str:
    percent = f"{confidence:.0%} interval"
    parts = []
    target = by_name.get("target")
    if target is None:
        parts.append("The gain was not measured.")
    else:
        words = {
            "gained": "Better at the target",
            "lost": "Worse at the target",
            "no clear gain": "No clear gain at the target",
        }
        scale, unit = (1, " nats per token") if target.metric == "answer_nll" else (100, " points")
        start, end = (f"{value:.1%}" if scale == 100 else f"{value:.3f}" for value in (target.before, target.after))
        digits = 1 if scale == 100 else 3
        parts.append(
            f"{words[gained]}: {start} to {end} ({target.difference * scale:+.{digits}f}{unit}, {percent} "
            f"{target.low * scale:+.{digits}f} to {target.high * scale:+.{digits}f}, {target.items} items)."
        )
    drift = by_name.get(DRIFT)
    lost = [name for name in counted if by_name[name].verdict == "lost"]
    if retained == "lost":
        what = [f"{name} {by_name[name].difference * 100:+.1f} points" for name in lost]
        if drift is not None and drift.verdict == "lost":
            what.append(f"cross-entropy on general text {drift.difference:+.3f} nats per token")
        parts.append(f"Something was lost: {', '.join(what)}.")
    elif retained == "nothing lost":
        parts.append(f"Nothing was lost: a drop of more than {100 * tolerance:g} points on general benchmarks is excluded.")
    elif retained == "too few items to say":
        worst = max((by_name[name].smallest_detectable_drop or 0) for name in counted)
        parts.append(f"Too few items to say whether anything was lost (a drop below {100 * worst:.1f} points could go unseen).")
    else:
        parts.append("Retention was not measured.")
    if drift is not None and retained != "lost":
        parts.append(f"Cross-entropy on general text changed by {drift.difference:+.3f} nats per token.")
    return " ".join(parts)
