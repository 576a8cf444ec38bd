"""Weights that gradients do not speak for are the base's after every step."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from selectune.training.policies import spider
from tests.training.policies.running import blocks, run, same


def by_hand(base, gradients):
    def rank(values):
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        return [1 / (1 + math.exp(-(v - mean) / spread)) if spread else 0.5 for v in values]

    magnitude, gradient = rank([abs(v) for v in base]), rank([abs(v) for v in gradients])
    share = [g / (m + g) if g > m else 0.0 for m, g in zip(magnitude, gradient, strict=True)]
    moved = [s for s in share if s]
    return [min(1.0, s / (sum(moved) / len(moved))) if moved else 0.0 for s in share]


def test_the_blend_is_the_formula():
    draw = torch.Generator().manual_seed(0)
    base, gradients = torch.randn(2, 2, generator=draw), torch.randn(2, 2, generator=draw)
    assert torch.allclose(spider.blend(base, gradients).view(-1),
                          torch.tensor(by_hand(base.view(-1).tolist(), gradients.view(-1).tolist())), atol=1e-6)  # fmt: skip
    wide = torch.randn(50, 40, generator=draw), torch.randn(50, 40, generator=draw)
    share = spider.blend(*wide)
    assert share.min() == 0 and share.max() <= 1
    assert not spider.blend(base, torch.zeros(2, 2)).any()
    assert torch.isfinite(spider.blend(torch.ones(8), torch.randn(8, generator=draw))).all()


def test_two_steps_by_hand():
    """Standard scores are 1.162 and 0.387 either way, their sigmoids 0.762 and 0.596; gradients rank the entries the other way round."""
    base, gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[4.0, -3.0], [-2.0, 1.0]])
    value = base.clone()
    stage = SimpleNamespace(values=lambda: {"w": base}, gradients=lambda: [("w", value, gradient)], tensors={}, passing={})
    policy = spider.Spider()
    policy.begin(stage)
    value += 1
    policy.after_step(stage)  # shares 0.762 and 0.596 by their mean, at most 1
    assert torch.allclose(value, torch.tensor([[2.0, 2.8777], [3.0, 4.0]]), atol=1e-4)
    assert torch.equal(value[1], base[1])
    value += 1
    gradient.neg_()
    policy.after_step(stage)  # the gradients add up to nothing
    assert torch.equal(value, base)


class Follow(TrainerCallback):
    """Adds up the gradients and holds every step against the formula."""

    def __init__(self):
        self.sums, self.base, self.moved = {}, {}, 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, value in model.named_parameters():
            if value.requires_grad:
                self.base.setdefault(name, value.detach().clone())
                self.sums[name] = self.sums.get(name, 0) + value.grad

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, value in model.named_parameters():
            if value.requires_grad:
                share = spider.blend(self.base[name], self.sums[name])
                assert torch.equal(value[share == 0], self.base[name][share == 0]), name
                self.moved += int((value != self.base[name]).sum())


def test_entries_that_are_outranked_equal_the_base_after_every_step(tmp_path, llama_folder):
    follow = Follow()
    run(tmp_path, llama_folder, "spider", choose=blocks, watching=[follow])
    assert follow.moved


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_blend_of_one_is_the_optimiser_and_of_zero_stays(value, tmp_path, llama_folder, monkeypatch):
    monkeypatch.setattr(spider, "blend", lambda base, gradients: torch.full_like(base, value))
    ran = run(tmp_path / "a", llama_folder, "spider")
    assert same(ran.after, run(tmp_path / "b", llama_folder).after if value else ran.base)


def test_the_baseline_pins_the_larger_half(tmp_path, llama_folder):
    ran = run(tmp_path, llama_folder, "spider:mask=magnitude", choose=blocks)
    for name in ran.selection.names():
        base = ran.base[name].view(-1)
        order = base.abs().argsort(descending=True, stable=True)
        pinned = order[: math.ceil(len(order) / 2)]
        assert torch.equal(ran.after[name].view(-1)[pinned], base[pinned])
        assert len(order) < 3 or not torch.equal(ran.after[name].view(-1), base)
