"""Noise towards the worst, agreement, and multipliers that keep the mean gradient."""

import pytest
import torch
from torch.nn import functional

from selectune.catalogue import create
from selectune.errors import UserError
from selectune.training.policies import roast
from tests.tiny import tiny
from tests.training.policies.staged import batch, make, stage


def test_multipliers_keep_the_mean_gradient():
    draw = torch.Generator().manual_seed(0)
    importance = {"a": torch.rand(6, 5, generator=draw), "b": torch.rand(20, generator=draw)}
    total = {name: torch.zeros_like(value) for name, value in importance.items()}
    for _ in range(4000):
        for name, value in roast.multipliers(importance, 0.6, 1.0, True, draw).items():
            total[name] += value / 4000
    for value in total.values():
        assert torch.allclose(value, torch.ones_like(value), atol=0.15)


def test_a_sharp_threshold_is_the_top_of_all_entries_together():
    draw = torch.Generator().manual_seed(0)
    importance = {"a": torch.rand(6, 5, generator=draw), "b": torch.rand(21, generator=draw) * 2}
    found = roast.multipliers(importance, 0.79, 1e6, True, draw)
    every = torch.cat([value.view(-1) for value in importance.values()])
    last = every.sort(descending=True).values[round(0.21 * 50)]
    for name, value in importance.items():
        assert torch.equal(found[name], (value >= last).float())


def by_hand(model, inputs, source, epsilon, agreement):
    ids, labels = inputs["input_ids"], inputs["labels"]
    table = model.get_input_embeddings().weight
    plain = table[ids]

    def said(states):
        logits = model(inputs_embeds=states, use_cache=False).logits[:, :-1]
        return logits, functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100
        )

    noise = (torch.rand(*ids.shape, table.shape[1], generator=source) * 1e-5).requires_grad_()
    (direction,) = torch.autograd.grad(said(plain.detach() + noise)[1], noise)
    largest = direction.abs().max(-1, keepdim=True).values
    size = epsilon * table.detach().pow(2).mean().sqrt()
    noisy, other = said(plain.detach() + noise.detach() + size * (direction / largest).nan_to_num())
    clean, usual = said(plain)
    counts = labels[:, 1:] != -100
    p, q = clean[counts].log_softmax(-1), noisy[counts].log_softmax(-1)
    divergence = 0.5 * ((p.exp() * (p - q)).sum(-1) + (q.exp() * (q - p)).sum(-1)).mean()
    return 0.5 * usual + 0.5 * other + agreement * divergence, usual, other


def test_the_loss_is_the_formula_with_its_gradient():
    one, inputs = stage(), batch()
    one.tokens = (inputs["labels"][:, 1:] != -100).sum()
    policy = make("roast:epsilon=0.3,agreement=0.7,masked=false")
    policy.before_step(one)
    total = policy.loss(one, inputs, lambda: one.whole(**inputs) / one.tokens)
    total.backward()
    model = tiny("llama").requires_grad_(True)
    expected, usual, other = by_hand(model, inputs, one.generator("noise/0/0"), 0.3, 0.7)
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert other > usual  # the noise is for the worse
    for name, value in model.named_parameters():
        assert torch.allclose(one.parameters[name].grad, value.grad, atol=1e-4, rtol=1e-2), name


def test_masks_follow_the_gradients_since_the_last_draw():
    one = stage()
    policy = make("roast:epsilon=0,threshold=0.5,sharpness=1e6,every=2,examples=4")
    policy.before_step(one)
    squares = {name: 0 for name in one.parameters}
    for row in one.sample(9, "importance"):
        one.clear()
        one.mean_loss(row).backward()
        squares = {name: squares[name] + value.grad**2 for name, value in one.parameters.items()}
    inside = [name for name in squares if ".layers." in name]
    every = torch.cat([squares[name].view(-1) for name in inside])
    middle = every.median()
    for name in inside:
        agree = (one.tensors[f"multiplier.{name}"] > 0) == (squares[name] > middle)
        assert agree.float().mean() > 0.99
    assert "multiplier.model.embed_tokens.weight" not in one.tensors
    before = dict(one.tensors)
    one.step = 1
    one.clear()
    one.mean_loss(batch()).backward()
    gradient = one.parameters[inside[0]].grad.clone()
    policy.before_step(one)
    policy.gradients(one)
    assert torch.equal(one.parameters[inside[0]].grad, gradient * before[f"multiplier.{inside[0]}"])
    assert torch.equal(one.tensors[f"squares.{inside[0]}"], gradient**2)  # of the gradient before the mask
    one.step = 2
    policy.before_step(one)
    assert not torch.equal(one.tensors[f"multiplier.{inside[0]}"], before[f"multiplier.{inside[0]}"])


def test_long_steps_of_updates_are_refused():
    with pytest.raises(UserError, match="a hundred times"):
        create("policies", "roast:mask=update")
    create("policies", "roast:mask=update,rescale=false")
