"""UDIM: the faithful-if lines of its card."""

import torch
from torch import nn

from selectune.data.packing import record_spans
from selectune.training.policies.policy import last_states
from selectune.training.policies.udim import Records, inconsistency, penalise
from tests.tiny import tiny
from tests.training.policies.running import run, same
from tests.training.policies.staged import batch, make, stage


def packed():
    """Two sequences of two records each, the last one shorter, then padding."""
    one = batch(2, length=20, seed=3)
    one["position_ids"] = torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1).contiguous()
    one["labels"][:, 12:15] = -100
    one["position_ids"][1, 17:] = torch.arange(3)
    one["labels"][1, 17:] = -100
    return one


def acted(policy, halves, step=9):
    """The gradients that a policy leaves."""
    one = stage()
    one.step, policy = step, make(policy)
    policy.before_step(one)
    for half in halves:
        policy.loss(one, half, lambda half=half: one.mean_loss(half) / len(halves)).backward()
    before = one.values()
    with torch.no_grad():
        policy.gradients(one)
    assert same(one.values(), before)
    return {name: value.grad.clone() for name, value in one.parameters.items()}


def test_without_the_penalty_and_before_it_begins_it_is_sharpness_aware():
    halves = [batch(1, seed=1), batch(1, seed=2)]
    plain = acted("sharpness:radius=0.3", halves)
    assert same(acted("udim:radius=0.3,inconsistency=0", halves), plain)
    assert same(acted("udim:radius=0.3,inconsistency=9", halves, step=3), plain)
    assert not same(acted("udim:radius=0.3,inconsistency=9", halves, step=4), plain)


def test_gradients_of_records_equal_those_of_each_alone():
    one, given = stage(), packed()
    with last_states(one.whole) as found:
        one.whole(**given)
    records = Records(one, found[0], given["position_ids"], given["labels"])
    together = records.gradients()
    spans = record_spans(given["position_ids"], given["labels"])
    assert len(together) == len(spans) == 4
    norm = one.whole.causal.model.norm
    for (start, end), gradient in zip(spans, together, strict=True):
        alone = {key: value.reshape(1, -1)[:, start:end] for key, value in given.items()}
        # the factor of a feature is that of the norm before it, relative to its weight
        wanted = one.gradient(alone, {"model.norm.weight"})["model.norm.weight"] * norm.weight.detach()
        assert torch.allclose(gradient, wanted, atol=1e-4, rtol=1e-3)


def test_inputs_that_are_not_moved_leave_the_size_of_the_gradients():
    own = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(inconsistency(torch.cat([own, own])), own.square().sum(1).mean() / 7)
    moved = own.flip(0) * 1.5 + 0.2
    spread = [((part - own.mean(0)) ** 2).mean(0) for part in (own, moved)]
    middle = (spread[0] + spread[1]) / 2
    wanted = (((spread[0] - middle) ** 2).mean() + ((spread[1] - middle) ** 2).mean()) / 2 + (moved**2).sum(1).mean() / 7
    assert torch.allclose(inconsistency(torch.cat([own, moved])), wanted)


def test_the_gradient_of_the_penalty_is_that_of_its_formula():
    one, given = stage(tiny("llama", tie_word_embeddings=False, attn_implementation="eager")), batch(3, seed=5)
    shift = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(1)) * 0.1
    penalise(one, given, shift, 2.0)
    found = {name: value.grad.clone() for name, value in one.parameters.items() if value.grad is not None}
    causal, factors = one.whole.causal, torch.ones(6, 1, 64, requires_grad=True)
    states = causal.model.embed_tokens(torch.cat([given["input_ids"]] * 2)) + torch.cat([torch.zeros_like(shift), shift])
    hidden = causal.model(inputs_embeds=states, use_cache=False).last_hidden_state * factors
    labels = torch.cat([given["labels"]] * 2)[:, 1:]
    losses = nn.functional.cross_entropy(causal.lm_head(hidden)[:, :-1].transpose(1, 2), labels, reduction="none")
    (gradients,) = torch.autograd.grad((losses.sum(1) / (labels != -100).sum(1)).sum(), factors, create_graph=True)
    one.clear()
    (2.0 * inconsistency(gradients.squeeze(1))).backward()
    assert found.keys() == {name for name, value in one.parameters.items() if value.grad is not None}
    for name, gradient in found.items():
        assert torch.allclose(gradient, one.parameters[name].grad, atol=1e-4, rtol=2e-3), name


def test_records_move_uphill_each_by_the_same_mean_length():
    given, policy = packed(), make("udim:distance=0.1")
    one = stage()
    embedded = one.whole.causal.get_input_embeddings()(given["input_ids"]).detach().requires_grad_(True)
    embedded.grad = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(2))
    shift = policy.shift(given, embedded).flatten(0, 1)
    mean = embedded.detach().norm(dim=-1).mean()
    spans = record_spans(given["position_ids"], given["labels"])
    for start, end in spans:
        assert torch.allclose(shift[start:end].square().sum(1).mean().sqrt(), 0.1 * mean)
        direction = embedded.grad.flatten(0, 1)[start:end]
        assert torch.allclose(
            nn.functional.cosine_similarity(shift[start:end].flatten(), direction.flatten(), dim=0), torch.tensor(1.0)
        )
    assert not shift[spans[-1][1] :].any()


def test_moved_inputs_are_worse_at_the_worst_nearby_weights(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "selectune.training.policies.udim.penalise", lambda stage, given, shift, weight: seen.append((given, shift))
    )
    acted("udim:radius=0.05,distance=0.1", [batch(2, seed=1)])
    one, ((given, shift),) = stage(), seen
    losses = []
    for sign in (-1, 0, 1):
        entry = one.whole.causal.get_input_embeddings()
        handle = entry.register_forward_hook(lambda module, inputs, output, sign=sign: output + sign * shift)
        losses.append(one.mean_loss(given).item())
        handle.remove()
    assert losses[0] < losses[1] < losses[2]


def test_a_penalty_makes_a_difference(tmp_path, llama_folder):
    policies = ({"method": "udim", "inconsistency": 0.0}, {"method": "udim", "inconsistency": 5.0}, "sharpness")
    zero, some, plain = (run(tmp_path / str(place), llama_folder, policy).after for place, policy in enumerate(policies))
    assert same(zero, plain) and not same(some, plain)
