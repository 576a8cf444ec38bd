"""A few blocks at a time, drawn anew, without the optimiser's memory."""

from collections import Counter

import pytest
import torch
from transformers import TrainerCallback

from selectune.parameters import Selection
from tests.training.policies.running import run
from tests.training.policies.staged import make, stage


class Watch(TrainerCallback):
    """Which parameters changed and which have a state, step by step."""

    def __init__(self):
        self.changed, self.states = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.changed.append({n for n, p in model.named_parameters() if not torch.equal(p, self.before[n])})
        self.states.append({n for n, p in model.named_parameters() if p in optimizer.state})


def number(names):
    return sorted({int(name.split(".layers.")[1].split(".")[0]) for name in names if ".layers." in name})


@pytest.mark.parametrize("outside", [True, False])
def test_exactly_so_many_blocks_change_between_two_draws(outside, tmp_path, llama_folder):
    watch = Watch()
    run(tmp_path, llama_folder, {"method": "layer_sampling", "blocks": 2, "every": 2, "outside": outside}, steps=8,
        choose=Selection.all, watching=[watch], evaluations=0)  # fmt: skip
    drawn = [number(changed) for changed in watch.changed]
    assert all(len(found) == 2 for found in drawn)
    assert drawn[0::2] == drawn[1::2] and len({tuple(found) for found in drawn}) > 1
    assert all(any("embed_tokens" in name for name in changed) == outside for changed in watch.changed)
    for changed, states in zip(watch.changed, watch.states, strict=True):
        assert number(states) == number(changed)  # no memory of what left


def test_draws_are_uniform_and_the_same_for_the_same_seed():
    policy, one = make("layer_sampling:blocks=1,every=1"), stage()
    counts = Counter()
    for step in range(800):
        one.step = step
        counts[tuple(number(policy.draw(one)))] += 1
    assert len(counts) == 4 and all(150 < count < 250 for count in counts.values())
    one.step = 5
    assert policy.draw(one) == make("layer_sampling:blocks=1,every=1").draw(one)


@pytest.mark.parametrize("by", ["gradient_norm", "fisher"])
def test_importance_is_that_of_the_gradients(by):
    one = stage()
    found = make({"method": "layer_sampling", "by": by, "examples": 3}).importance(one, [0, 1, 2, 3])
    gradients = []
    for row in one.sample(3, "importance"):
        one.clear()
        one.mean_loss(row).backward()
        gradients.append(
            [torch.cat([v.grad.view(-1) for n, v in one.parameters.items() if f".layers.{b}." in n]) for b in range(4)]
        )
    for block in range(4):
        each = torch.stack([one_row[block] for one_row in gradients])
        sums = each.mean(0).norm() if by == "gradient_norm" else each.pow(2).sum(1).mean()
        assert float(found[block]) == pytest.approx(float(sums), rel=1e-4)


def test_draws_follow_importance(monkeypatch):
    policy, one = make("layer_sampling:blocks=1,every=1,by=fisher"), stage()
    monkeypatch.setattr(type(policy), "importance", lambda self, stage, present: torch.tensor([1.0, 0.0, 3.0, 0.0]))
    counts = Counter()
    for step in range(400):
        one.step = step
        counts[number(policy.draw(one))[0]] += 1
    assert set(counts) == {0, 2} and 2 < counts[2] / counts[0] < 4.5
