"""Searches against enumeration, with tables instead of trainings; and what a trial is worth."""

import itertools
import math
import random

import pytest
import torch

from selectune.models import load_base
from selectune.parameters import Selection
from selectune.parameters.factors.knapsack import backward_knapsack, knapsack
from selectune.parameters.factors.search import Exhausted, Table, Trials, descend, distant, evolve, greedy
from selectune.parameters.factors.trial import loss_on, trial
from tests.contracts.test_parameters import RECORDS, context


def table(seed, units=5):
    source = random.Random(seed)
    return {tuple(code): source.random() for size in range(units + 1) for code in itertools.combinations(range(units), size)}


def test_each_candidate_is_measured_once_and_the_budget_is_kept():
    asked = []
    values = Table(lambda key: asked.append(key) or -key, most=3)
    assert [values(key) for key in (2, 1, 2, 3)] == [-2, -1, -2, -3]
    assert asked == [2, 1, 3] and values.best() == 1 and values(3) == -3
    with pytest.raises(Exhausted):
        values(4)


@pytest.mark.parametrize("seed", range(20))
def test_greedy_takes_the_best_step_of_every_round(seed):
    known, slack = table(seed), 0.1
    for backward in (False, True):
        chosen = tuple(range(5)) if backward else ()
        best, path = chosen, [chosen]
        while True:
            steps = [tuple(u for u in chosen if u != x) for x in chosen] if backward else [
                tuple(sorted((*chosen, x))) for x in range(5) if x not in chosen
            ]  # fmt: skip
            if not steps:
                break
            chosen = max(steps, key=lambda step: known[step])
            path.append(chosen)
            best = max((best, chosen), key=lambda step: known[step])
            if known[chosen] < known[best] - slack:
                break
        assert greedy(range(5), known.__getitem__, backward=backward, slack=slack) == best
    gained = ()
    for chosen in _forward(known):
        if known[chosen] - known[gained] <= slack:
            break
        gained = chosen
    assert greedy(range(5), known.__getitem__, slack=slack, rule="gain") == gained


def _forward(known):
    chosen = ()
    while len(chosen) < 5:
        chosen = max((tuple(sorted((*chosen, x))) for x in range(5) if x not in chosen), key=known.__getitem__)
        yield chosen


def test_an_endless_slack_stops_one_rule_at_once_and_lets_the_other_see_everything():
    known = table(3)
    assert greedy(range(5), known.__getitem__, slack=math.inf, rule="gain") == ()
    way = [(), *_forward(known)]
    assert greedy(range(5), known.__getitem__, slack=math.inf) == max(way, key=known.__getitem__)
    assert len(greedy(range(5), lambda code: len(code), most=2)) == 2
    limited = Table(known.__getitem__, most=4)  # ends within the first round: the best of what was measured is taken
    assert greedy(range(5), limited) == max(limited.values, key=limited.values.__getitem__) != ()
    assert len(limited.values) == 4


@pytest.mark.parametrize("seed", range(5))
def test_evolution_finds_the_best_of_what_can_be_enumerated(seed):
    source = random.Random(seed)
    known = {code: source.random() for code in itertools.product(range(4), repeat=3)}
    values = Table(known.__getitem__)
    evolve(3, 4, values, torch.Generator().manual_seed(seed))
    assert values.best() == max(known, key=known.__getitem__)
    few = Table(known.__getitem__, most=7)
    evolve(3, 4, few, torch.Generator().manual_seed(seed))
    assert len(few.values) == 7


@pytest.mark.parametrize("seed", range(5))
def test_evolution_gets_nearer_than_chance(seed):
    source = random.Random(seed)
    target, *codes = [tuple(source.choices(range(4), k=8)) for _ in range(141)]

    def near(code):
        return -sum(one != other for one, other in zip(code, target, strict=True))

    values = Table(near)
    evolve(8, 4, values, torch.Generator().manual_seed(seed), population=20, generations=15, parents=8)
    assert len(values.values) == 140
    last = [*values.values.values()][-8:]
    assert sum(last) / 8 > sum(map(near, codes)) / 140 / 2  # not half as far


@pytest.mark.parametrize("seed", range(5))
def test_without_mutation_a_childs_digits_are_those_of_two_of_the_best(seed):
    """But where it would be known already: one of its digits is drawn anew."""
    source = random.Random(seed)
    values = Table(lambda code: source.random())
    evolve(8, 50, values, torch.Generator().manual_seed(seed), population=20, generations=1, parents=8, mutation=0.0)
    codes = list(values.values)
    best = sorted(codes[:20], key=values, reverse=True)[:8]
    drawn = 0
    for child in codes[20:]:
        foreign = [[digit not in (m, f) for digit, m, f in zip(child, mother, father, strict=True)]
                   for mother, father in itertools.combinations(best, 2)]  # fmt: skip
        drawn += min(map(sum, foreign))
        assert min(map(sum, foreign)) == 0 or min(sum(map(int.__ne__, child, parent)) for parent in best) == 1
    assert len(codes) == 28 and drawn < 8


def test_finalists_are_the_best_that_are_far_enough_apart():
    source = random.Random(1)
    known = {code: source.random() for code in itertools.product(range(3), repeat=4)}

    def cosine(one, two):
        left, right = (torch.nn.functional.one_hot(torch.tensor(code), 3).float().view(-1) for code in (one, two))
        return float(torch.cosine_similarity(left, right, dim=0))

    kept = []
    for code in sorted(known, key=known.__getitem__, reverse=True):
        if len(kept) < 4 and all(1 - cosine(code, other) >= 0.75 - 1e-6 for other in kept):
            kept.append(code)
    assert distant(known, 3, 4, 0.75) == kept and len(kept) > 1


def test_a_tree_is_gone_down_by_the_best_child():
    children = {"": ["a", "b"], "a": ["aa", "ab"], "b": ["ba", "bb"]}
    known = {"a": 1, "b": 2, "aa": 9, "ab": 9, "ba": 4, "bb": 3}
    assert list(descend("", lambda node: children.get(node, []), known.__getitem__)) == ["b", "ba"]


@pytest.mark.parametrize("seed", range(10))
def test_knapsacks_are_exact(seed):
    source = random.Random(seed)
    count = source.randint(1, 10)
    values = [source.uniform(-0.3, 1) for _ in range(count)]
    own, passing = ([source.randint(0, 9) for _ in range(count)] for _ in range(2))
    sets = [list(s) for size in range(count + 1) for s in itertools.combinations(range(count), size)]

    def worth(places):
        return sum(values[place] for place in places)

    for budget in range(40):
        inside = [places for places in sets if sum(own[place] for place in places) <= budget]
        found = knapsack(values, own, budget)
        assert sum(own[place] for place in found) <= budget
        assert worth(found) == pytest.approx(max(map(worth, inside)))

        def cost(places):
            return sum(own[place] for place in places) + (sum(passing[: max(places) + 1]) if places else 0)

        found = backward_knapsack(values, own, passing, budget)
        assert cost(found) <= budget
        assert worth(found) == pytest.approx(max(worth(places) for places in sets if cost(places) <= budget))


def test_a_trial_is_worth_what_it_gains_on_records_held_out(llama_folder):
    base = load_base(llama_folder)
    asked = context(base)
    selection = Selection.of(base.model, base.anatomy.blocks[2].parameters)
    for folds in (1, 3):
        trials = Trials(asked, steps=2, learning_rate=1e-2, examples=6, folds=folds, batch=1)
        assert trials(Selection({})) == 0
        ours = sorted(RECORDS, key=lambda record: record.key)
        splits = [(ours, sorted(RECORDS[:2], key=lambda record: record.key))] if folds == 1 else [
            ([r for r in ours if r not in ours[fold::3]], ours[fold::3]) for fold in range(3)
        ]  # fmt: skip
        gains = []
        for train, held in splits:
            model = trial(asked, selection, records=train, steps=2, learning_rate=1e-2, batch=1).model
            gains.append(loss_on(asked, held) - loss_on(asked, held, model))
        assert trials(selection) == sum(gains) / len(gains) == trials(selection)
    general = Trials(asked, steps=2, learning_rate=1e-1, examples=6, retention=0.5, batch=1)
    model = trial(asked, selection, records=general.splits[0][0], steps=2, learning_rate=1e-1, batch=1).model
    held = general.splits[0][1]
    rise = max(loss_on(asked, asked.general, model) - loss_on(asked, asked.general), 0)
    assert general(selection) == pytest.approx(loss_on(asked, held) - loss_on(asked, held, model) - 0.5 * rise)
