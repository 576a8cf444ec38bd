"""Decisions made twice: the close ones, and no others."""

import random

import pytest

from selectune.evaluation.near_ties import PROBES, NearTies, Score


def rounded(exact, noise, seed=0):
    generator = random.Random(seed)
    return [Score(score.total + generator.gauss(0, noise), score.margin + generator.gauss(0, noise)) for score in exact]


def questions(count, choices, spread, seed=1):
    generator = random.Random(seed)
    scores = [Score(generator.gauss(0, spread), generator.gauss(0, spread)) for _ in range(count * choices)]
    return [list(range(start, start + choices)) for start in range(0, len(scores), choices)], scores


@pytest.mark.parametrize("choices", [1, 2, 4])
@pytest.mark.parametrize("lengths", [False, True])
def test_decisions_are_those_of_exact_scores(choices, lengths):
    groups, exact = questions(600, choices, 1.0)
    fast, asked = rounded(exact, 0.02), []
    sizes = [1 + index % 7 for index in range(len(exact))]

    def exactly(indices):
        asked.extend(indices)
        return {index: exact[index] for index in indices}

    ties = NearTies(groups, [1] * len(exact), sizes if lengths else None)
    settled = ties.settle(fast, exactly)

    def decisions(scores):
        if choices == 1:
            return [score.greedy for score in scores]
        scales = [lambda i: 1, *([lambda i: sizes[i]] if lengths else [])]
        return [[max(group, key=lambda i: scores[i].total / scale(i)) for scale in scales] for group in groups]

    assert decisions(fast) != decisions(exact)  # else nothing is tested
    assert decisions(settled) == decisions(exact)
    assert len(asked) == len(set(asked)) < len(exact) / 2  # nothing is computed twice, and most of it not once


def test_clear_decisions_are_left_alone():
    groups, _ = questions(100, 2, 1.0)
    exact = [Score(-10.0 * (index % 2), -1.0) for index in range(200)]
    ties = NearTies(groups, [1] * 200)
    ties.settle(rounded(exact, 0.01), lambda indices: {index: exact[index] for index in indices})
    assert len(ties.again) == PROBES


def test_choices_that_cannot_win_are_not_computed_again():
    exact = [Score(total, -1.0) for _ in range(200) for total in (0.0, -0.01, -30.0)]
    asked = []

    def exactly(indices):
        asked.extend(indices)
        return {index: exact[index] for index in indices}

    groups = [list(range(start, start + 3)) for start in range(0, 600, 3)]
    settled = NearTies(groups, [1] * 600).settle(rounded(exact, 0.02), exactly)
    assert len([index for index in asked if index % 3 == 2]) == PROBES
    assert all(settled[index] == exact[index] for index in range(600) if index % 3 != 2)
