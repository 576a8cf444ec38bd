"""GOT-D, SIFT and BIDS: the faithful-if lines of their cards."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import linprog

from selectune.data import Message, Record
from selectune.examples import Pool, toward_target
from selectune.examples.factors.transport import calibrated_gradient, potentials
from selectune.examples.toward_target import (
    LeastUncertain,
    Nearest,
    TransportGradient,
    around_their_mean,
    balanced,
    least_uncertain,
)


def cost_of(costs, source):
    """Exact transport from some masses to uniform ones, as a linear programme."""
    n, m = costs.shape
    rows = [np.kron(np.eye(n)[i], np.ones(m)) for i in range(n)] + [np.kron(np.ones(n), np.eye(m)[j]) for j in range(m)]
    return linprog(costs.reshape(-1), A_eq=np.array(rows), b_eq=[*source, *np.full(m, 1 / m)]).fun


def test_the_calibrated_gradient_is_that_of_exact_transport():
    generator = np.random.default_rng(0)
    costs = generator.random((6, 5))
    source, *_ = potentials(costs, 0.004, steps=100_000)
    found = calibrated_gradient(source)
    assert calibrated_gradient(source + 3.7) == pytest.approx(found)  # a potential is known up to a constant
    step = 1e-4
    for i in range(6):
        moved = np.full(6, 1 / 6) - step / 5
        moved[i] = 1 / 6 + step
        exact = (cost_of(costs, moved) - cost_of(costs, np.full(6, 1 / 6))) / step
        assert found[i] == pytest.approx(exact, abs=0.03)


def test_equal_sets_have_no_gradient_and_the_far_record_the_largest():
    points = np.random.default_rng(1).random((8, 3))
    source, *_ = potentials(np.linalg.norm(points[:, None] - points[None], axis=-1), 0.01)
    assert np.abs(calibrated_gradient(source)).max() < 0.05
    pool = np.concatenate([points, [[9.0, 9.0, 9.0]]])
    costs = np.linalg.norm(pool[:, None] - points[None], axis=-1)
    source, *_ = potentials(costs / costs.max(), 0.05)
    assert int(calibrated_gradient(source).argmax()) == 8


def variance(vectors, targets, chosen, noise):
    """The posterior variance in closed form, summed over targets."""
    some = vectors[chosen]
    kernel = some @ some.T + noise * np.eye(len(chosen))
    return sum(float(t @ t - t @ some.T @ np.linalg.solve(kernel, some @ t)) for t in targets)


@pytest.mark.parametrize("repeat", [False, True])
def test_what_is_left_is_the_closed_form_and_each_step_the_best(repeat):
    generator = np.random.default_rng(2)
    vectors, targets = generator.normal(size=(12, 5)), generator.normal(size=(2, 5))
    places, left = least_uncertain(vectors, targets, 6, 0.1, repeat)
    for step in range(6):
        chosen = places[: step + 1].tolist()
        assert left[step] == pytest.approx(variance(vectors, targets, chosen, 0.1), abs=1e-6)
        others = [j for j in range(12) if repeat or j not in chosen[:-1]]
        assert left[step] == pytest.approx(min(variance(vectors, targets, [*chosen[:-1], j], 0.1) for j in others), abs=1e-6)
    assert all(a >= b - 1e-9 for a, b in pairwise(left))
    assert repeat or len(set(places.tolist())) == 6


def test_a_repetition_waits_and_great_noise_is_nearest_neighbours():
    target = np.array([[1.0, 0.0, 0.0]])
    near = np.array([0.9, 0.43589, 0.0])
    vectors = np.stack([near, near, np.array([0.8, 0.0, 0.6])])
    assert set(least_uncertain(vectors, target, 2, 0.01)[0].tolist()) != {0, 1}
    generator = np.random.default_rng(3)
    many = generator.normal(size=(20, 4))
    many /= np.linalg.norm(many, axis=1, keepdims=True)
    nearest = np.argsort(-((many @ many[0]) ** 2))[:5]
    assert least_uncertain(many, many[:1], 5, 1e6)[0].tolist() == nearest.tolist()


class Drawn:
    """A sentence encoder to which each sentence is a vector of two numbers that it names."""

    def embed(self, texts):
        return np.array([[float(number) for number in text.split()] for text in texts], np.float32)


def asks(*numbers):
    return Record("chat", (Message("user", " ".join(map(str, numbers))), Message("assistant", "yes")))


def test_a_record_that_points_away_from_the_target_comes_last(monkeypatch):
    monkeypatch.setattr("selectune.models.sentence_encoder.sentence_encoder", Drawn)
    records = [asks(-1, 0), asks(0.6, 0.8), asks(-0.6, 0.8), asks(0.8, -0.6), asks(0, 1)]
    made = Pool(records, lambda: None, lambda words: None, [asks(1, 0)], quiet=True)
    method = LeastUncertain(count=4, centre=False)
    choice = method.select(made)
    assert choice.places.tolist() == [3, 1, 4, 2]  # the antipode, the very best of them by its square, is left
    assert "only 2 records" in made.notes[0]
    vectors = np.array([[0.6, 0.8], [0.8, -0.6]])
    for place, chosen in ((3, [1]), (1, [1, 0])):
        left = variance(vectors, np.array([[1.0, 0.0]]), chosen, method.noise)
        assert choice.signals["variance left"][place] == pytest.approx(left, abs=1e-6)
    assert np.isnan(choice.signals["variance left"][[0, 2, 4]]).all()
    made.target = [asks(1, 0), asks(-1, 0)]
    assert 0 in LeastUncertain(count=1, centre=False).select(made).places  # toward one of them is enough


def test_only_the_nearest_are_looked_at_and_enough_is_enough(monkeypatch):
    drawn = np.random.default_rng(0).normal(size=(30, 4))
    whole, left = least_uncertain(drawn, drawn[:3], 30, 0.1)
    some, of_some = least_uncertain(drawn, drawn[:3], 30, 0.1, sizes=np.full(30, 3), enough=7)
    assert len(whole) == 30 and some.tolist() == whole[:3].tolist() and of_some.tolist() == left[:3].tolist()
    monkeypatch.setattr("selectune.models.sentence_encoder.sentence_encoder", Drawn)
    records = [asks(0.98, 0.2), asks(0.6, 0.8), asks(0.97, -0.24), asks(0.8, -0.6), asks(0.99, 0.14)]
    made = Pool(records, lambda: None, lambda words: None, [asks(1, 0)], quiet=True)
    choice = LeastUncertain(count=4, centre=False, candidates=2).select(made)
    assert set(choice.places[:2].tolist()) == {0, 4} and choice.places[2:].tolist() == [2, 3] and not made.notes
    assert np.isfinite(choice.signals["variance left"]).sum() == 2


def test_of_two_equal_questions_the_nearest_takes_both_and_the_least_uncertain_one(monkeypatch):
    monkeypatch.setattr("selectune.models.sentence_encoder.sentence_encoder", Drawn)
    copy = Record("chat", (asks(0.9, 0.43589).messages[0], Message("assistant", "no")))
    made = Pool([asks(0.9, 0.43589), copy, asks(0.8, -0.6)], lambda: None, lambda words: None, [asks(1, 0)], quiet=True)
    assert set(Nearest(count=2).select(made).places) == {0, 1}
    assert 2 in LeastUncertain(count=2, centre=False).select(made).places


@pytest.mark.parametrize("count", [1, 2, 7])
def test_equal_questions_are_not_told_apart_by_rounding(monkeypatch, count):
    monkeypatch.setattr("selectune.models.sentence_encoder.sentence_encoder", Drawn)
    (asked, _), answers = asks(0.6, 0.8).messages, map(str, range(count))
    copies = [Record("chat", (asked, Message("assistant", answer))) for answer in answers]
    made = Pool(copies, lambda: None, lambda words: None, [asks(0.6, 0.8)], quiet=True)
    choice = LeastUncertain(count=1).choose(made)
    assert np.isfinite(choice.signals["variance left"]).sum() == 1 and not made.notes
    lone = np.array([[0.6, 0.8], [0.6, 0.8], [-0.6, 0.8]], np.float32)
    own, wanted = around_their_mean(lone, lone[:1], np.arange(3))
    assert np.linalg.norm(own, axis=1) == pytest.approx(1) and wanted[0] == pytest.approx(own[0])
    own, wanted = around_their_mean(lone[1:], (lone[1:].mean(0, keepdims=True)), np.arange(2))
    assert np.linalg.norm(own, axis=1) == pytest.approx(1) and not wanted.any()


def test_transport_takes_what_the_target_lacks(monkeypatch):
    monkeypatch.setattr("selectune.models.sentence_encoder.sentence_encoder", Drawn)
    records = [*(replace(asks(1, 0), line=n, source=str(n)) for n in range(3)), asks(0, 1)]
    made = Pool(records, lambda: None, lambda words: None, [asks(0, 1)] * 4, quiet=True)
    assert TransportGradient(count=1).select(made).places.tolist() == [3]
    choice = TransportGradient(count=1, block=2).select(made)
    assert choice.places.tolist() == [3] and np.isfinite(choice.signals["transport gradient"]).all() and not made.notes
    monkeypatch.setattr(toward_target, "potentials", lambda costs, weight: (np.zeros(len(costs)), None, False))
    TransportGradient(count=1, block=2).select(made)
    assert made.notes[0].startswith("transport of 2 of 2 blocks did not settle")


def by_loop(influence, count):
    scores = (influence - influence.mean(0)) / influence.std(0)
    chosen = []
    for _ in range(count):
        mean = scores[chosen].mean(0) if chosen else np.zeros(scores.shape[1])
        chosen.append(max((i for i in range(len(scores)) if i not in chosen), key=lambda i: (scores[i] - mean).max()))
    return chosen


def test_balanced_choice_is_the_loop_and_does_not_see_scale_or_repeated_columns():
    influence = np.random.default_rng(4).normal(size=(50, 5))
    found = balanced(influence, 12).tolist()
    assert found == by_loop(influence, 12)
    assert balanced(influence * np.array([1, 10, 0.1, 7, 3]) + np.arange(5), 12).tolist() == found
    assert balanced(np.concatenate([influence, influence[:, :2]], axis=1), 12).tolist() == found
    assert balanced(influence[:, :1], 12).tolist() == np.argsort(-influence[:, 0], kind="stable")[:12].tolist()
    loud = np.stack([np.r_[np.ones(10), np.zeros(40)] * 10, np.r_[np.zeros(40), np.ones(10)]], axis=1)
    served = balanced(loud + np.random.default_rng(5).normal(size=(50, 2)) * 1e-3, 10)
    assert (served < 10).sum() >= 4 and (served >= 40).sum() >= 4
