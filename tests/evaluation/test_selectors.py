"""One sheet for all selectors: the whole pool is 1 and 1, ranks follow the definitions, every selector of the catalogue has its numbers."""

import math

import pytest

from selectune.evaluation.selectors import Feasibility, efficiency, feasibility, feasibility_ranks
from selectune.examples.judged import Judged
from selectune.examples.random import AllExamples, RandomExamples
from selectune.examples.self_scoring import HighestLoss
from selectune.examples.toward_target import Nearest
from selectune.examples.trained import Learnability, Trajectories
from selectune.meter import Cost, Meter
from tests.examples.test_signals import RECORDS, pool


def test_the_whole_pool_is_one_and_one():
    assert efficiency(50, 50, 0.7, 0.7).fraction == efficiency(50, 50, 0.7, 0.7).ratio == 1
    assert efficiency(5, 50, 0.35, 0.7) == efficiency(500, 5000, 0.35, 0.7)
    assert efficiency(5, 50, 0.35, 0.7).fraction == pytest.approx(0.1) and efficiency(5, 50, 0.35, 0.7).ratio == pytest.approx(
        0.5
    )
    assert efficiency(50, 50, 1.5, 1.5, is_loss=True).ratio == 1
    assert efficiency(5, 50, 1.2, 1.5, is_loss=True).ratio == pytest.approx(math.exp(-1.2) / math.exp(-1.5))
    assert math.isnan(efficiency(5, 50, 0.1, 0.0).ratio)


def need(trained=0, steps=1, model=False, data=False, outside=False, target=False):
    return Feasibility(trained, steps, 0, model, data, outside, target)


def test_ranks_are_places_of_penalties():
    found = {"plain": need(), "reads": need(steps=2, model=True), "trains": need(2, 3, True, True), "asks": need(outside=True)}
    assert found["trains"].simplicity_penalty == 2 * 2 + 3 and found["trains"].flexibility_penalty == 2
    assert need(target=True).flexibility_penalty == 1
    ranks = feasibility_ranks(found)
    assert {name: (one.simplicity, one.flexibility, one.feasibility) for name, one in ranks.items()} == {
        "plain": (1, 1, 1), "reads": (2, 2, 3), "trains": (3, 3, 4), "asks": (1, 2, 2),
    }  # fmt: skip


def chosen(method, folder):
    meter = Meter("choose")
    method.select(pool(folder, target=RECORDS[:3], meter=meter))
    return feasibility(method, meter.cost)


def test_what_a_selector_needs_is_read_from_what_it_cost(llama_folder):
    nothing = chosen(RandomExamples(count=3), llama_folder)
    assert nothing == Feasibility(0, 1, 0, False, False, False, False) == feasibility(AllExamples(), Cost(stage="choose"))
    reads = chosen(HighestLoss(count=3), llama_folder)
    assert (reads.trained_models, reads.steps, reads.model_bound, reads.data_bound) == (0, 2, True, False)
    tries = chosen(Learnability(count=3, steps=1), llama_folder)
    assert (tries.trained_models, tries.steps, tries.data_bound, tries.hyper_parameters) == (2, 3, True, 4)
    assert chosen(Trajectories(count=3, steps=2, checkpoints=4), llama_folder).trained_models == 1
    assert feasibility(Judged(by_endpoint="http://x", price_read=1.0), Cost(stage="choose")).hyper_parameters == 3
    near = chosen(Nearest(count=3, vectors="gradient"), llama_folder)
    assert near.needs_target and near.steps == 3 and near.trained_models == 0
    assert not chosen(Nearest(count=3, vectors="base"), llama_folder).data_bound


def test_costs_add_up():
    both = Cost(stage="a", trainings=2).after(Cost(stage="b", trainings=3))
    assert both.trainings == 5
