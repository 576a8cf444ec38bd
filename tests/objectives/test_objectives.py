"""Objectives against their formulas written out, through one interface: chunks, weights, references, entropies."""

import pytest
import torch
from torch.nn import functional

from selectune import catalogue
from selectune.models import load_base
from selectune.models.head import SplitModel
from selectune.objectives import objective as module
from selectune.parameters import Selection
from selectune.training.loss import LossOfModel
from tests.tiny import tiny

CHOICES = ["cross_entropy", "cross_entropy:label_smoothing=0.1", "dft", "dft:plain_share=0.3", "asft", "asft:scaled=false",
           "asft:direction=model_to_base"]  # fmt: skip


def batch(seed=0, positions=40, hidden=16, vocabulary=50):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, positions, hidden, generator=generator)
    labels = torch.randint(0, vocabulary, (2, positions), generator=generator)
    labels[:, : positions // 2] = -100
    weight = torch.randn(vocabulary, hidden, generator=generator)
    return (
        states,
        labels,
        weight,
        torch.rand(2, positions, generator=generator),
        torch.randn(vocabulary, hidden, generator=generator),
    )


def by_hand(name, logits, reference, target):
    """One token's loss, from its logits, as the papers write it."""
    log = functional.log_softmax(logits, -1)
    base = functional.log_softmax(reference, -1)
    cross_entropy, scale = -log[target], log[target].exp().item()
    forward, backward = (base.exp() * (base - log)).sum(), (log.exp() * (log - base)).sum()
    return {
        "cross_entropy": cross_entropy,
        "cross_entropy:label_smoothing=0.1": 0.9 * cross_entropy - 0.1 * log.mean(),
        "dft": scale * cross_entropy,
        "dft:plain_share=0.3": (0.3 + 0.7 * scale) * cross_entropy,
        "asft": scale * cross_entropy + 0.05 * forward,
        "asft:scaled=false": cross_entropy + 0.05 * forward,
        "asft:direction=model_to_base": scale * cross_entropy + 0.05 * backward,
    }[name]


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize("choice", CHOICES)
def test_losses_and_gradients_are_those_of_the_formula(choice, chunk, monkeypatch):
    for name in ("CHUNK", "CHUNK_OF_TRAINED_HEAD"):
        monkeypatch.setattr(module, name, chunk)
    states, labels, weight, weights, other = batch()
    states.requires_grad_(True)
    weight.requires_grad_(True)
    found = catalogue.create("objectives", choice).loss(
        lambda s: s @ weight.T, states, labels, weights, (lambda s: s @ other.T, states.detach()), [weight], entropy=True
    )
    (found.total * 0.5).backward()
    ours = states.grad.clone(), weight.grad.clone()
    states.grad = weight.grad = None
    total, log_probabilities, entropies = 0, [], []
    for row in range(2):
        for place in range(1, labels.shape[1]):
            if labels[row, place] == -100:
                continue
            logits = states[row, place - 1] @ weight.T
            beside = (states[row, place - 1] @ other.T).detach()
            total = total + weights[row, place] * by_hand(choice, logits, beside, labels[row, place])
            log = functional.log_softmax(logits, -1).detach()
            log_probabilities.append(log[labels[row, place]])
            entropies.append(-(log.exp() * log).sum())
    (total * 0.5).backward()
    assert torch.allclose(found.total, total, rtol=1e-5)
    assert torch.allclose(ours[0], states.grad, atol=1e-5) and torch.allclose(ours[1], weight.grad, atol=1e-4)
    assert torch.allclose(found.log_probability, torch.stack(log_probabilities), atol=1e-5)
    assert torch.allclose(found.entropy, torch.stack(entropies), atol=1e-4)


def test_tokens_without_weight_never_meet_the_vocabulary():
    states, labels, weight, weights, _ = batch()
    weights[:, 30:] = 0
    met = []

    def head(part):
        met.append(len(part))
        return part @ weight.T

    catalogue.create("objectives", "cross_entropy").loss(head, states, labels, weights)
    assert sum(met) == 2 * 10


def test_no_chunk_is_computed_twice(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 8)
    states, labels, weight, _, _ = batch()
    met = []

    def head(part):
        met.append(len(part))
        return part @ weight.T

    catalogue.create("objectives", "cross_entropy").total(head, states.requires_grad_(True), labels).backward()
    assert sum(met) == int((labels[:, 1:] != -100).sum()) and max(met) == 8


def test_bf16_is_the_plain_computation_to_its_rounding(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)
    states, labels, weight, _, _ = batch(positions=60, hidden=64)
    objective = catalogue.create("objectives", "cross_entropy")
    plain, half = states.clone().requires_grad_(True), states.clone().requires_grad_(True)
    exact = objective.total(lambda s: s @ weight.T / 8, plain, labels)
    exact.backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = objective.total(lambda s: s @ weight.T / 8, half, labels)
    found.backward()
    assert torch.allclose(found, exact, rtol=1e-2)
    assert torch.nn.functional.cosine_similarity(plain.grad.flatten(), half.grad.flatten(), 0) > 0.999


def test_the_gradient_of_dft_is_that_of_the_mean_probability():
    states, labels, weight, _, _ = batch()
    one, two = states.clone().requires_grad_(True), states.clone().requires_grad_(True)
    catalogue.create("objectives", "dft").total(lambda s: s @ weight.T, one, labels).backward()
    kept = labels[:, 1:] != -100
    probability = (two[:, :-1] @ weight.T).softmax(-1)[kept].gather(-1, labels[:, 1:][kept][:, None])
    (-probability.sum()).backward()
    assert torch.allclose(one.grad, two.grad, atol=1e-5)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_the_anchor_is_the_untrained_base(form, llama_folder):
    base = load_base(llama_folder, dtype=torch.float32)
    model = catalogue.create("adapters", form).apply(base, Selection.all(base.model), 0)
    ids = torch.arange(3, 35)[None]
    inputs = {"input_ids": ids, "position_ids": torch.arange(32)[None], "labels": ids}
    anchored = LossOfModel(model, catalogue.create("objectives", "asft:anchor=5,scaled=false"), bfloat16=False)
    plain = LossOfModel(model, catalogue.create("objectives", "cross_entropy"), bfloat16=False)
    assert torch.allclose(anchored(**inputs), plain(**inputs), atol=1e-4)  # untrained, the divergence is 0
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.05)
    reference = tiny("llama").eval()
    reference.load_state_dict(load_base(llama_folder, dtype=torch.float32).model.state_dict())
    split, theirs = SplitModel(model), SplitModel(reference)
    ours, base_says = (s.logits(s.hidden(input_ids=ids))[0, :-1].log_softmax(-1) for s in (split, theirs))
    divergence = (base_says.exp() * (base_says - ours)).sum()
    assert torch.allclose(anchored(**inputs), plain(**inputs) + 5 * divergence, rtol=1e-4)


def test_where_the_model_is_sure_the_gradient_of_bf16_logits_is_that_of_fp32_sums():
    logits = torch.zeros(3, 50, dtype=torch.bfloat16)
    logits[:, 7] = torch.tensor([8.0, 12.0, 16.0])
    given, exact = logits.clone().requires_grad_(True), logits.float().requires_grad_(True)
    targets = torch.tensor([7, 7, 7])
    (-module.Predictions(given, targets).log_probability).sum().backward()
    torch.nn.functional.cross_entropy(exact, targets, reduction="sum").backward()
    assert torch.allclose(given.grad.float(), exact.grad, rtol=1e-2, atol=0)
