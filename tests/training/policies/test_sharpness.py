"""Gradients are those of the worst nearby weights."""

import torch

from tests.training.policies.running import run, same
from tests.training.policies.staged import batch, make, stage


def test_the_gradient_is_taken_uphill_and_the_weights_come_back():
    one, halves = stage(), [batch(1, seed=1), batch(1, seed=2)]
    policy, before = make("sharpness:radius=0.3"), one.values()
    policy.before_step(one)
    for half in halves:
        policy.loss(one, half, lambda half=half: one.mean_loss(half) / 2).backward()
    first = {name: value.grad.clone() for name, value in one.parameters.items()}
    norm = torch.cat([gradient.view(-1) for gradient in first.values()]).norm()
    with torch.no_grad():
        policy.gradients(one)
    assert same(one.values(), before)
    found = {name: value.grad.clone() for name, value in one.parameters.items()}
    for name, value in one.parameters.items():
        value.data.add_(0.3 * first[name] / norm)
    one.clear()
    uphill = sum(one.mean_loss(half) for half in halves) / 2
    uphill.backward()
    for name, value in one.parameters.items():
        assert torch.allclose(found[name], value.grad, atol=1e-4, rtol=1e-3), name
        value.data.copy_(before[name])
    assert uphill > sum(one.mean_loss(half) for half in halves) / 2
    assert not torch.allclose(found["lm_head.weight" if "lm_head.weight" in found else "model.embed_tokens.weight"],
                              first["model.embed_tokens.weight"], atol=1e-3)  # fmt: skip


def test_a_radius_makes_a_difference(tmp_path, llama_folder):
    assert not same(run(tmp_path / "a", llama_folder).after, run(tmp_path / "b", llama_folder, "sharpness").after)
