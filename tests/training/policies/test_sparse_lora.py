"""SparseLoRA: the faithful-if lines of the card."""

import copy

import pytest
import torch

from selectune import catalogue
from selectune.errors import UserError
from selectune.models import load_base
from selectune.parameters import Selection
from selectune.training.policies.sparse_lora import Predictor, sparse_unit
from tests.training.policies.running import blocks, run, same
from tests.training.policies.staged import batch, make, stage

LORA = {"choose": blocks, "form": "lora:rank=4"}


def unit(folder, seed=0):
    base = load_base(folder)
    model = catalogue.create("adapters", "lora:rank=4").apply(base, Selection.all(base.model), 0)
    made = model.base_model.model.model.layers[1].mlp
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "lora_B" in name:
                value += torch.randn_like(value)
    return made


def test_the_predictor_is_the_best_approximation_and_takes_the_largest(llama_folder):
    made = unit(llama_folder)
    states = torch.randn(9, 64)
    predictor = Predictor(made, 8)
    for (first, second), layer in ((predictor.gate, made.gate_proj), (predictor.up, made.up_proj)):
        weight = layer.base_layer.weight.t()
        left, values, right = torch.linalg.svd(weight)
        assert torch.allclose(first @ second, left[:, :8] * values[:8] @ right[:8], atol=1e-4)
    scores = (
        torch.nn.functional.silu(states @ predictor.gate[0] @ predictor.gate[1]) * (states @ predictor.up[0] @ predictor.up[1])
    ).norm(dim=0)
    assert predictor.channels(states, 0.75).tolist() == sorted(scores.argsort(descending=True)[:32].tolist())
    whole = Predictor(made, 64)
    exact = (
        torch.nn.functional.silu(states @ made.gate_proj.base_layer.weight.T) * (states @ made.up_proj.base_layer.weight.T)
    ).norm(dim=0)
    assert whole.channels(states, 0.75).tolist() == sorted(exact.argsort(descending=True)[:32].tolist())


def test_a_thinned_unit_is_the_unit_with_its_other_channels_masked(llama_folder):
    made = unit(llama_folder)
    states = torch.randn(7, 64)
    channels = torch.tensor([3, 17, 50, 99])
    mask = torch.zeros(128)
    mask[channels] = 1
    by_hand = made.down_proj(made.act_fn(made.gate_proj(states)) * made.up_proj(states) * mask)
    thin = sparse_unit(made, states, channels)
    assert torch.allclose(thin, by_hand, atol=1e-4, rtol=1e-4)
    factors = [value for name, value in made.named_parameters() if "lora_" in name]
    weights = torch.randn_like(thin)
    found, wanted = (torch.autograd.grad((output * weights).sum(), factors) for output in (thin, by_hand))
    assert all(torch.allclose(one, other, atol=1e-3, rtol=1e-4) for one, other in zip(found, wanted, strict=True))
    everything = sparse_unit(made, states, torch.arange(128))
    assert torch.allclose(everything, made(states), atol=1e-4, rtol=1e-4)


def test_response_tokens_are_computed_in_full(llama_folder):
    from types import SimpleNamespace

    from selectune.training.policies.sparse_lora import SparseLoRA, _thinned

    made = unit(llama_folder)
    learnt = torch.tensor([False, False, True, False, True])
    stage = SimpleNamespace(passing={"tokens": (torch.tensor([0, 1, 3]), torch.tensor([2, 4]))})
    dense = copy.deepcopy(made)
    made.forward = _thinned(made, SparseLoRA(sparsity=0.9), stage)
    states = torch.randn(1, 5, 64)
    found, whole = made.train()(states), dense(states)
    assert torch.allclose(found[0, learnt], whole[0, learnt], atol=1e-5)
    assert not torch.allclose(found[0, ~learnt], whole[0, ~learnt], atol=1e-1)
    with torch.no_grad():
        assert torch.equal(made(states), whole)  # a reference that an objective compares with
    assert torch.equal(made.eval()(states), whole)


def test_padding_has_no_say_in_the_channels(llama_folder, monkeypatch):
    seen = []
    channels = Predictor.channels
    monkeypatch.setattr(
        Predictor, "channels", lambda self, states, sparsity: [seen.append(len(states)), channels(self, states, sparsity)][1]
    )
    base = load_base(llama_folder)
    one = stage(catalogue.create("adapters", "lora:rank=4").apply(base, Selection.all(base.model), 0), everything=False)
    policy = make("sparse_lora:dense_steps=0,dense_blocks=0")
    policy.begin(one)
    inputs = batch(1)
    inputs["labels"][0, 14:] = -100
    inputs["position_ids"][0, 14:] = torch.arange(6)  # padding is a record of its own
    one.whole.train()
    policy.loss(one, inputs, lambda: one.whole(**inputs)).backward()
    assert seen == [4] * 4  # the token before the first of the response predicts it


@pytest.mark.parametrize("form", ["lora:dropout=0.1", "lora:magnitude=true"])
def test_adapters_with_more_than_factors_are_refused(form, tmp_path, llama_folder):
    with pytest.raises(UserError, match="knows no dropout"):
        run(tmp_path, llama_folder, "sparse_lora:dense_blocks=0", choose=blocks, form=form)


def test_without_sparsity_it_is_lora_and_with_it_the_adapters_still_train(tmp_path, llama_folder):
    plain = run(tmp_path / "plain", llama_folder, prefix_cache=False, **LORA)
    none = run(tmp_path / "none", llama_folder, {"method": "sparse_lora", "sparsity": 0.0}, **LORA)
    assert all(torch.allclose(value, plain.after[name], atol=1e-5) for name, value in none.after.items())
    some = run(tmp_path / "some", llama_folder, {"method": "sparse_lora", "sparsity": 0.9, "dense_blocks": 0.0}, **LORA)
    assert not same(some.after, plain.after)
    late = run(tmp_path / "late", llama_folder, {"method": "sparse_lora", "sparsity": 0.9, "dense_steps": 1.0}, **LORA)
    assert all(torch.allclose(value, plain.after[name], atol=1e-5) for name, value in late.after.items())
