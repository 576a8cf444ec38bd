"""GraSP and SynFlow against obvious re-computations."""

import pytest
import torch

from selectune.data import Encoder
from selectune.models import load_base
from selectune.parameters.factors.gradients import first
from selectune.parameters.factors.scores import Settings, find
from selectune.parameters.factors.targets import targets
from tests.contracts.test_parameters import RECORDS, context
from tests.tiny import ARCHITECTURES


def gradients(model, weights, temperature):
    """The mean over two records of the gradient of the loss, in fp64, by the model's own forward pass."""
    total = [torch.zeros_like(weight) for weight in weights]
    for record in first(RECORDS, 2):
        (piece,) = Encoder(model.words, 128).encode(record)
        logits = model(input_ids=torch.tensor([piece.input_ids]), use_cache=False).logits[0, :-1] / temperature
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(piece.labels)[1:], ignore_index=-100)
        for one, more in zip(total, torch.autograd.grad(loss, weights), strict=True):
            one += more / 2
    return total


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_grasp_is_the_weight_times_the_gradients_change_along_itself(architecture, tiny_folders):
    base = load_base(tiny_folders[architecture], dtype=torch.float32)
    eligible = targets(base)[:7]
    found = find("grasp")(context(base), eligible, Settings(examples=2))
    model = base.model.double()
    model.words = base.tokenizer
    weights = [model.get_parameter(target.name).requires_grad_(True) for target in eligible]
    goal = gradients(model, weights, 200.0)
    sides, step = [], 1e-4 / torch.cat([one.view(-1) for one in goal]).norm()
    for sign in (1, -1):
        with torch.no_grad():
            for weight, one in zip(weights, goal, strict=True):
                weight += sign * step * one
        sides.append(gradients(model, weights, 1.0))
        with torch.no_grad():
            for weight, one in zip(weights, goal, strict=True):
                weight -= sign * step * one
    for target, weight, up, down in zip(eligible, weights, *sides, strict=True):
        expected = (weight * (up - down) / (2 * step)).detach().float()
        assert torch.allclose(found[target.name], expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max())), target.name


def scale(states):
    return states / states.pow(2).mean().sqrt().detach()


def test_synflow_is_the_positive_linear_networks_weight_times_gradient(llama_folder):
    base = load_base(llama_folder, dtype=torch.float32)
    found = find("synflow")(context(base), targets(base), Settings())
    weights = {name: value.detach().double().abs().requires_grad_(True) for name, value in base.model.named_parameters()}
    state = torch.ones(64, dtype=torch.float64)
    for block in range(4):
        own = {name.split(".")[-2]: value for name, value in weights.items() if f".layers.{block}." in name}
        value = (own["v_proj"] @ scale(state)).view(2, 1, 16).expand(2, 2, 16).reshape(64)  # two query heads a key head
        state = state + own["o_proj"] @ value
        inside = scale(state)
        state = state + own["down_proj"] @ ((own["gate_proj"] @ inside) * (own["up_proj"] @ inside))
    (weights["model.embed_tokens.weight"] @ scale(state)).sum().backward()
    for target in targets(base):
        if target.role in ("query", "key"):
            assert found[target.name].max() < 1e-9  # rounding of what is zero
        else:
            expected = (weights[target.name] * weights[target.name].grad).abs().detach().float()
            assert torch.allclose(found[target.name], expected, rtol=1e-4), target.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("score", ["grasp", "synflow"])
def test_every_architecture_has_them_and_the_base_stays_as_it_was(score, architecture, tiny_folders):
    base = load_base(tiny_folders[architecture])
    before = {name: value.clone() for name, value in base.model.named_parameters()}
    found = find(score)(context(base), targets(base), Settings(examples=1))
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in found.values())
    assert sum(int(value.any()) for value in found.values()) > len(found) / 2
    assert all(torch.equal(value, before[name]) for name, value in base.model.named_parameters())


def test_force_is_signed_and_snip_is_its_size(llama_folder):
    base = load_base(llama_folder)
    eligible = targets(base)
    force, snip, mean = (find(one)(context(base), eligible, Settings(examples=2)) for one in ("force", "snip", "signed_gradient"))
    for target in eligible:
        assert torch.equal(force[target.name].abs(), snip[target.name]) and (force[target.name] < 0).any()
        assert torch.equal(force[target.name], -base.model.get_parameter(target.name).float() * mean[target.name])
