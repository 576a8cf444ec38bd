"""GORACS: greedy beginning, exchanges and estimates against direct evaluation."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from scipy.optimize import linprog

from selectune.data import Message, Record
from selectune.errors import UserError
from selectune.examples import goracs
from selectune.examples.factors.last_block import Effort
from selectune.examples.factors.store import measure
from selectune.examples.factors.submodular import lazy_greedy
from selectune.examples.factors.transport import exact
from selectune.examples.goracs import Costs, GroupTransport, Service, begun, estimates, exchanged, in_turns
from tests.contracts.test_examples import no_download  # noqa: F401
from tests.examples.test_signals import RECORDS, pool
from tests.examples.test_toward_target import cost_of


def problem(n, m, seed=0, effort=0.0):
    generator = np.random.default_rng(seed)
    return Costs(generator.normal(size=(n, 3)), generator.normal(size=(m, 3)), generator.random(n), effort)


def test_exact_transport_is_the_linear_programme_and_potentials_are_feasible():
    costs = np.random.default_rng(0).random((5, 7))
    value, potentials = exact(costs)
    assert value == pytest.approx(cost_of(costs, np.full(5, 1 / 5)))
    other = (costs - potentials[:, None]).min(0)
    assert potentials.mean() + other.mean() == pytest.approx(value)  # with the best potentials of the columns nothing is lost


def test_costs_are_on_zero_to_one_and_hard_records_are_nearer():
    generator = np.random.default_rng(1)
    vectors, target, hardness = generator.normal(size=(9, 3)), generator.normal(size=(4, 3)), generator.random(9)
    distances = np.linalg.norm(vectors[:, None] - target[None], axis=-1)
    raw = distances / distances.max() - 0.3 * (hardness / hardness.max())[:, None]
    found = Costs(vectors, target, hardness, 0.3).of(np.arange(9))
    assert found == pytest.approx((raw - raw.min()) / (raw.max() - raw.min()), abs=1e-6)


def test_the_greedy_beginning_is_the_plain_one_and_none_is_idle():
    costs = problem(30, 20)
    everything = costs.of(np.arange(30))
    service, chosen = Service(costs), []
    for _ in range(5):
        gains = [everything[[*chosen, e]].min(0).sum() if e not in chosen else np.inf for e in range(30)]
        before = everything[chosen].min(0) if chosen else np.ones(20)
        assert before.sum() - np.array(gains)[[1, 2]] == pytest.approx(service.gains(np.array([1, 2])), abs=1e-6) or {1, 2} & set(
            chosen
        )
        chosen.append(int(np.argmin(gains)))
        service.add(chosen[-1])
    assert chosen[0] == everything.sum(1).argmin()
    assert lazy_greedy(Service(costs), 5)[0].tolist() == chosen
    found = begun(costs, 5)
    assert len(set(found.tolist())) == 5
    assert len(set(everything[found].argmin(0).tolist())) == 5  # each serves somebody
    assert len(set(begun(problem(30, 3), 8).tolist())) == 8  # more than can serve


def test_more_than_can_serve_the_target_are_near_it_all_the_same():
    generator = np.random.default_rng(2)
    near, target = generator.normal(size=(20, 3)), generator.normal(size=(3, 3))
    costs = Costs(np.concatenate([near + 50, near]), target, np.ones(40), 0.0)
    found = begun(costs, 8)
    assert len(set(found.tolist())) == 8 and found.min() >= 20
    everything = costs.of(np.arange(40))
    assert {int(place) for place in everything.argmin(0)} <= set(found.tolist())
    assert exact(everything[found])[0] < 1.5 * exact(everything[20:])[0]


@pytest.mark.parametrize("listed", [30, 4_000_000])
def test_turns_are_those_of_the_whole_matrix_and_look_at_each_record_a_few_times(monkeypatch, listed):
    monkeypatch.setattr(goracs, "LISTED", listed)
    costs = problem(5000, 3, 7)
    everything, left, expected = costs.of(np.arange(5000)), set(range(5000)), set()
    while len(expected) < 60:
        rest = np.array(sorted(left))
        turn = set(rest[everything[rest].argmin(0)].tolist())
        if len(expected) + len(turn) > 60:
            break
        expected |= turn
        left -= turn
    asked, of = [], costs.of
    monkeypatch.setattr(costs, "of", lambda places: asked.append(len(places)) or of(places))
    found = in_turns(costs, 60)
    assert len(set(found.tolist())) == 60 and set(found[: len(expected)].tolist()) == expected
    assert max(asked) <= goracs.BLOCK and sum(asked) <= 5000 * (2 if listed > 30 else 8)


@pytest.mark.parametrize("seed", range(4))
def test_exchanges_lower_the_transport_and_stay_above_the_optimum(seed):
    costs = problem(8, 6, seed)
    everything = costs.of(np.arange(8))
    start = begun(costs, 3)
    chosen, values = exchanged(costs, start, 100, 8)
    assert len(set(chosen.tolist())) == 3 and all(a > b for a, b in pairwise(values))
    assert values[0] == pytest.approx(exact(everything[start])[0]) and values[-1] == pytest.approx(exact(everything[chosen])[0])
    optimum = min(exact(everything[list(some)])[0] for some in combinations(range(8), 3))
    assert optimum - 1e-9 <= values[-1] <= values[0]
    single = min(exact(everything[[*np.delete(chosen, i), e]])[0] for i in range(3) for e in range(8) if e not in chosen)
    assert single >= values[-1] - 1e-9  # with all candidates tried no exchange is left that helps


def test_with_one_candidate_a_side_the_worst_goes_the_best_outside_comes_and_none_twice():
    vectors, target = np.array([[0.0], [5], [6], [7], [8], [9]]), np.linspace(0, 0.05, 6)[:, None]
    chosen, values = exchanged(Costs(vectors, target, np.ones(6), 0.0), np.array([0, 4, 5]), 10, 1)
    assert sorted(chosen.tolist()) == [0, 1, 2] and len(values) == 3  # twice the nearest would be less, and is no choice


def test_the_target_itself_is_no_transport():
    points = np.random.default_rng(3).normal(size=(10, 3))
    costs = Costs(points, points, np.ones(10), 0.0)
    assert exact(costs.of(exchanged(costs, begun(costs, 10), 10, 3)[0]))[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("covered", [9, 10, 11])
def test_estimates_are_the_largest_dual_value_of_a_new_record(covered):
    costs = problem(12, covered, 5)
    everything, chosen = costs.of(np.arange(12)), np.array([2, 5, 7])
    inside = everything[chosen]
    _, potentials = exact(inside)
    reduced = inside - potentials[:, None]
    for place in (0, 5):
        rows = [row for row in range(3) if chosen[row] != place]
        least = reduced[rows].min(0)
        own = np.array([1]) if place == 5 else None
        found = estimates(everything[[place]], inside, potentials, own)[0]
        left = everything[place] - least  # maximise y / 3 - sum of t / covered with t_j >= y - left_j, t_j >= 0
        bound = linprog(
            [-1 / 3, *np.full(covered, 1 / covered)],
            np.c_[np.ones(covered), -np.eye(covered)],
            left,
            bounds=[(None, None), *[(0, None)] * covered],
        )
        assert found == pytest.approx(-bound.fun, abs=1e-9)


def labelled(i, answer):
    return Record(
        "classification",
        (Message("user", f"Lamp {i}?"), Message("assistant", "abc"[answer])),
        choices=("a", "b", "c"),
        answer=answer,
    )


def test_classes_get_the_targets_shares_and_effort_counts(llama_folder):
    records = [labelled(i, i % 2) for i in range(12)]
    target = [labelled(i, 0) for i in range(20, 23)] + [labelled(30, 1)]
    choice = GroupTransport(count=4).select(pool(llama_folder, records, target=target))
    assert [records[place].answer for place in choice.places].count(0) == 3
    made = pool(llama_folder, target=RECORDS[:3])
    plain, heavy = (GroupTransport(count=3, effort=weight).select(made).places for weight in (0, 50))
    effort = measure(made, Effort())
    assert effort[heavy].mean() > effort[plain].mean() and len(heavy) == len(plain) == 3
    assert effort.argmax() in heavy


def test_a_class_without_a_target_has_no_share_and_comes_last(llama_folder):
    records = [labelled(i, answer) for answer, size in enumerate((2, 1, 5)) for i in range(10 * answer, 10 * answer + size)]
    target = [labelled(30, 0), labelled(31, 1)]
    choice = GroupTransport(count=4, effort=0).select(pool(llama_folder, records, target=target))
    assert sorted(choice.places[:3].tolist()) == [0, 1, 2] and records[choice.places[3]].answer == 2
    with pytest.raises(UserError, match="no record has an answer of the target's"):
        GroupTransport(count=2, effort=0).select(pool(llama_folder, records[3:], target=target))


def test_no_more_exchanges_are_tried_than_allowed(monkeypatch):
    tried = []
    monkeypatch.setattr(goracs, "TRIED", 4)
    monkeypatch.setattr(goracs, "exact", lambda found: tried.append(found) or (1.0, np.zeros(len(found))))
    costs = problem(20, 10)
    chosen, values = exchanged(costs, np.arange(5), 100, 5)
    assert chosen.tolist() == list(range(5)) and values == [1.0] and len(tried) == 1 + 4  # the beginning is no try


def test_what_the_group_leaves_of_a_budget_is_filled_by_cost(llama_folder):
    def record(i, answer):
        return Record("chat", (Message("user", "What lamp? " + "The lazy dog. " * (i % 7)), Message("assistant", answer)))

    records = [record(i, "lamp " * 30 + str(i)) for i in range(4)] + [record(i, f"Fault {i}.") for i in range(10, 18)]
    made = pool(llama_folder, records, target=records[:4])
    choice = GroupTransport(fraction=0.35, by="tokens", effort=0).select(made)
    short = choice.places[choice.places >= 4]
    cost = choice.signals["mean cost"][short]
    assert len(short) > 3 and (np.diff(cost) >= 0).all() and cost[-1] > cost[0]
