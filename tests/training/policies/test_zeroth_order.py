"""Two forward passes and a seed make a step."""

import math

import pytest
import torch

from selectune import recipe as recipes
from selectune.pipeline import Chain
from selectune.run import Run
from selectune.training.policies import zeroth_order
from tests.tiny import tiny
from tests.training.policies.running import blocks, run, same
from tests.training.policies.staged import batch, make, stage


def direction(one):
    """Draw the direction of a step as it is drawn there."""
    source = one.generator("direction")
    return {name: torch.randn(value.shape, generator=source) for name, value in one.parameters.items()}


def step(one, policy, inputs, rate=0.0):
    one.learning_rate, one.tokens = rate, (inputs["labels"][:, 1:] != -100).sum()
    with torch.no_grad():
        policy.before_step(one)
        loss = policy.loss(one, inputs, lambda: one.whole(**inputs) / one.tokens)
        difference = one.passing["difference"]
        policy.gradients(one)
    return float(loss), difference


@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_the_difference_is_the_slope_along_the_masked_direction(sparsity):
    one = stage(tiny("llama").double())
    policy = make({"method": "zeroth_order", "sparsity": sparsity, "epsilon": 1e-4})
    policy.begin(one)
    inputs = batch()
    before = one.values()
    _, difference = step(one, policy, inputs)
    for name, value in one.parameters.items():
        assert torch.allclose(value, before[name], atol=1e-12)  # back where it was
        value.data.copy_(before[name])
    gradient, drawn = one.gradient(inputs), direction(one)
    slope = 0.0
    for name, value in before.items():
        order = value.abs().view(-1).sort().values
        most = order[math.ceil((1 - sparsity) * len(order)) - 1] if sparsity else math.inf
        slope += float((gradient[name] * drawn[name] * (value.abs() <= most)).sum())
    assert difference / 2e-4 == pytest.approx(slope, rel=1e-2)


def test_a_step_is_along_the_direction_and_leaves_large_weights_bit_for_bit():
    one = stage()
    policy = make("zeroth_order:sparsity=0.8,epsilon=0.01")
    policy.begin(one)
    before = one.values()
    _, difference = step(one, policy, batch(), rate=0.5)
    drawn = direction(one)
    for name, value in one.parameters.items():
        small = before[name].abs() <= zeroth_order.limit(before[name], 0.8)
        assert 0.19 < small.float().mean() < 0.23 or before[name].unique().numel() == 1
        assert torch.equal(value[~small], before[name][~small])
        expected = before[name] - 0.5 * difference / 0.02 * drawn[name]
        assert torch.allclose(value[small], expected[small], atol=1e-5)


def test_a_mask_that_leaves_nothing_out_is_no_mask_bit_for_bit():
    after = []
    for sparsity in (0.0, 1e-9):
        one = stage()
        policy = make({"method": "zeroth_order", "sparsity": sparsity})
        policy.begin(one)
        step(one, policy, batch(), rate=0.5)
        assert all(mask.all() for mask in one.passing.get("masks", {}).values())
        after.append(one.values())
    assert same(*after)


def test_masks_follow_the_weights_and_limits_stay():
    one = stage()
    policy = make("zeroth_order:sparsity=0.5")
    policy.begin(one)
    name = "model.layers.0.mlp.up_proj.weight"
    limit = one.passing["limits"][name]
    one.parameters[name].data.mul_(3)
    policy.before_step(one)
    assert torch.equal(one.passing["masks"][name], one.parameters[name].abs() <= limit)


def test_no_sparsity_is_plain_and_micro_batches_add_up(tmp_path, llama_folder):
    settings = {"choose": blocks, "steps": 4, "evaluations": 0, "rate": 1e-4}
    whole = run(tmp_path / "a", llama_folder, "zeroth_order", micro_batch_sequences=4, **settings)
    parts = run(tmp_path / "b", llama_folder, "zeroth_order", micro_batch_sequences=1, **settings)
    assert not same(whole.after, whole.base)
    moved = torch.cat([(whole.after[name] - whole.base[name]).view(-1) for name in whole.selection.names()])
    apart = torch.cat([(whole.after[name] - parts.after[name]).view(-1) for name in whole.selection.names()])
    assert apart.norm() < 0.02 * moved.norm()


@pytest.mark.parametrize(("given", "rate"), [({}, 3e-6), ({"training": {"learning_rate": 1e-3}}, 1e-3)])
def test_where_no_rate_is_named_it_is_one_that_such_steps_bear(given, rate, tmp_path):
    chain = Chain(Run(tmp_path), recipes.parse({"policy": "zeroth_order", "form": "lora", **given}), quiet=True)
    assert chain.training.training.learning_rate == rate


def test_the_loss_falls_without_a_gradient(tmp_path, llama_folder):
    one = stage(rows=1)
    policy = make("zeroth_order")
    policy.begin(one)
    losses = []
    for number in range(120):
        one.step = number
        losses.append(step(one, policy, batch(1), rate=2e-4)[0])
    assert sum(losses[-10:]) < sum(losses[:10]) - 2.0
    assert all(value.grad is None for value in one.parameters.values())
