"""Short norms give the values and gradients of the models' own, and keep less."""

import pytest
import torch

from selectune.models.norms import short_norms
from tests.tiny import ARCHITECTURES, OTHERS, tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_values_and_gradients_are_those_of_the_model(architecture, dtype):
    model = tiny(architecture).to(dtype)
    ids = torch.arange(3, 40)[None]
    found = []
    for short in (False, True):
        model.zero_grad()
        if short:
            with short_norms(model):
                logits = model(input_ids=ids, use_cache=False).logits
                logits.float().pow(2).mean().backward()
        else:
            logits = model(input_ids=ids, use_cache=False).logits
            logits.float().pow(2).mean().backward()
        found.append((logits.detach().float(), {n: v.grad.float() for n, v in model.named_parameters() if v.grad is not None}))
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    assert torch.allclose(found[0][0], found[1][0], **close)
    for name, value in found[0][1].items():
        difference = (value - found[1][1][name]).norm() / value.norm().clamp(min=1e-6)
        assert difference < (1e-4 if dtype == torch.float32 else 5e-2), name


def test_it_is_used_where_it_should_be_and_leaves_no_trace():
    model = tiny("llama")
    with short_norms(model) as count:
        assert count == 9  # two in each of four blocks, and one before the head
    assert not any("forward" in module.__dict__ for module in model.modules())
    with short_norms(tiny("gpt2")) as count:
        assert count == 0


def test_it_keeps_its_input_and_one_number_a_token():
    model = tiny("llama").requires_grad_(False)
    norm, states = model.model.norm, torch.randn(2, 10, 64, requires_grad=True)
    kept = []
    with short_norms(model), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(states)
    assert sorted(tuple(t.shape) for t in kept) == [(2, 10, 1), (2, 10, 64), (64,)]
    assert any(t.data_ptr() == states.data_ptr() for t in kept)
