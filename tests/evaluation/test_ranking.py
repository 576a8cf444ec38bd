"""Regret@k and NDCG: the lines of their definitions."""

import itertools
import math

import pytest

from selectune.errors import UserError
from selectune.evaluation.ranking import ndcg, regret_at

PERFORMANCE = {"law": 0.8, "water": 0.6, "soil": 0.7, "none": 0.5}
PERFECT = ["law", "soil", "water", "none"]


def test_regret_is_what_following_the_ranking_loses():
    worst = PERFECT[::-1]
    assert regret_at(1, worst, PERFORMANCE) == pytest.approx(100 * (0.8 - 0.5) / 0.8)
    assert regret_at(2, worst, PERFORMANCE) == pytest.approx(100 * (0.8 - 0.6) / 0.8)
    for ranking in itertools.permutations(PERFECT):
        assert regret_at(len(ranking), ranking, PERFORMANCE) == 0
        falling = [regret_at(k, ranking, PERFORMANCE) for k in range(1, 5)]
        assert falling == sorted(falling, reverse=True)
        assert (falling[0] == 0) == (ranking[0] == "law")


def test_ndcg_is_one_for_the_best_order_alone():
    gains = {name: value - 0.5 for name, value in PERFORMANCE.items()}
    assert ndcg(PERFECT, gains) == pytest.approx(1)
    assert all(ndcg(ranking, gains) < 1 for ranking in itertools.permutations(PERFECT) if list(ranking) != PERFECT)
    by_hand = (0.1 + 0.2 / math.log2(3)) / (0.3 + 0.2 / math.log2(3))
    assert ndcg(["water", "soil", "law", "none"], gains, 2) == pytest.approx(by_hand)
    harm = gains | {"none": -5.0}
    assert ndcg(PERFECT[::-1], harm) == pytest.approx(ndcg(PERFECT[::-1], gains))  # harm is no relevance
    assert math.isnan(ndcg(PERFECT, dict.fromkeys(PERFECT, -1.0)))


def test_what_makes_no_sense_is_refused():
    for wrong in (["law"], ["law", "water", "soil", "air"], ["law", "law", "water", "soil"]):
        with pytest.raises(UserError, match="the same sources"):
            regret_at(1, wrong, PERFORMANCE)
        with pytest.raises(UserError, match="the same sources"):
            ndcg(wrong, PERFORMANCE)
    with pytest.raises(UserError, match="positive"):
        regret_at(1, ["a"], {"a": -2.0})
    with pytest.raises(UserError, match="positive"):
        regret_at(0, ["a"], {"a": 2.0})
