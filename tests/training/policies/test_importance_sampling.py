"""Scores learnt by turning blocks down, and draws by them."""

import math
from collections import Counter

import pytest
import torch

from selectune.parameters import Selection
from selectune.training.policies import importance_sampling
from selectune.training.policies.sampled import by_block
from tests.training.policies.running import blocks, dense, run, same
from tests.training.policies.staged import make, stage
from tests.training.policies.test_layer_sampling import Watch, number


def test_the_update_of_scores_is_the_formula():
    scores = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    before = scores.tolist()
    sets, losses = [torch.tensor([0, 1]), torch.tensor([1, 2])], torch.tensor([1.0, 2.0], dtype=torch.float64)
    importance_sampling.learnt(scores, sets, losses, 10.0)
    mean = (math.exp(-1) + math.exp(-2)) / 2
    expected = list(before)
    for places, loss in (([0, 1], 1.0), ([1, 2], 2.0)):
        for i in places:
            p = 1 / (1 + math.exp(-before[i]))
            expected[i] += (math.exp(-loss) - mean) * p * (1 - p) * 10
    assert scores.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("by", ["importance", "uniform"])
def test_exactly_a_share_of_the_blocks_changes_at_each_step(by, tmp_path, llama_folder):
    watch = Watch()
    run(tmp_path, llama_folder, {"method": "importance_sampling", "by": by, "every": 2, "examples": 2}, choose=blocks,
        watching=[watch], evaluations=0)  # fmt: skip
    assert all(len(number(changed)) == 1 for changed in watch.changed)
    assert len({tuple(number(changed)) for changed in watch.changed}) > 1


def test_the_control_draws_all_blocks_alike_whatever_was_learnt():
    policy, one, counts = make("importance_sampling:by=uniform"), stage(), Counter()
    one.tensors["scores"] = torch.tensor([4.0, 0.0, -4.0, 0.0], dtype=torch.float64)
    for step in range(800):
        one.step = step
        counts[tuple(number(policy.draw(one)))] += 1
    assert len(counts) == 4 and all(150 < count < 250 for count in counts.values())
    assert one.tensors["scores"].tolist() == [4.0, 0.0, -4.0, 0.0]


def test_one_block_alone_is_turned_down_too(tmp_path, llama_folder):
    def one_block(model):
        return Selection.of(model, [name for name, _ in model.named_parameters() if ".layers.2." in name])

    ran = run(tmp_path, llama_folder, "importance_sampling:every=2,examples=2", choose=one_block, evaluations=0)
    assert not same(ran.after, ran.base)


def test_turning_down_shrinks_the_change_and_comes_back_exactly():
    one = stage()
    policy = make("importance_sampling:strength=0.25")
    policy.begin(one)
    with torch.no_grad():
        for value in one.parameters.values():
            value.add_(torch.randn_like(value))
    before, base = one.values(), one.passing["base"]
    with policy.turned_down(one, {1}, by_block(one)):
        for name, value in one.parameters.items():
            inside = ".layers.1." in name
            expected = base[name] + 0.25 * (before[name] - base[name]) if inside else before[name]
            assert torch.allclose(value, expected, atol=1e-6), name
            assert inside or torch.equal(value, before[name])
    assert same(one.values(), before)


def test_a_block_that_does_nothing_is_found_out():
    one = stage(rows=2)
    policy = make("importance_sampling:strength=0,examples=2,rate=10,sets=6")
    policy.begin(one)
    optimiser = torch.optim.Adam([v for n, v in one.parameters.items() if ".layers.2." not in n], lr=3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        sum(one.mean_loss(row) for row in one.sample(2)).backward()
        optimiser.step()
    found, scores = by_block(one), torch.zeros(4, dtype=torch.float64)
    found.pop(None)
    for step in range(1, 30):
        one.step = step
        policy.learn(one, found, [0, 1, 2, 3], scores)
    assert scores.argmax() == 2 and scores[2] > scores.mean()


def test_adapters_are_turned_down_by_their_scaling(tmp_path, llama_folder):
    policy = {"method": "importance_sampling", "every": 2, "examples": 2, "active": 0.5}
    ran = run(tmp_path / "a", llama_folder, policy, form="lora", choose=blocks)
    again = run(tmp_path / "b", llama_folder, policy, form="lora", choose=blocks)
    assert same(ran.after, again.after)
    layer = ran.model.base_model.model.model.layers[1].mlp.up_proj
    made = make(policy)
    one = stage(ran.model)
    made.begin(one)
    with made.turned_down(one, {1}, by_block(one)):
        assert layer.scaling == {"default": 0.5} and same(dense(ran.model), ran.after)
    assert layer.scaling == {"default": 2.0}
