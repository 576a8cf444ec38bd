"""No sequence moves the weights by more than the limit, and the account adds up."""

import pytest
import torch

from selectune.training.policies import private
from tests.training.policies.running import blocks, run, same
from tests.training.policies.staged import batch, make, stage


def made(settings):
    return make({"method": "private", **settings})


@pytest.mark.parametrize("per", ["all", "module"])
def test_every_sequence_is_clipped_by_itself(per):
    one, inputs = stage(), batch(3)
    policy = made({"clip": 0.5, "noise": 0.0, "per": per})
    with torch.no_grad():
        policy.before_step(one)
        policy.loss(one, inputs, lambda: torch.zeros(()))
        policy.gradients(one)
    total = {name: torch.zeros_like(value) for name, value in one.parameters.items()}
    for number in range(3):
        gradient = one.gradient({key: value[number : number + 1] for key, value in inputs.items()})
        groups = {name: name.rpartition(".")[0] if per == "module" else "" for name in gradient}
        limit = 0.5 / len(set(groups.values())) ** 0.5
        for group in set(groups.values()):
            members = [name for name in gradient if groups[name] == group]
            norm = sum(float(gradient[name].pow(2).sum()) for name in members) ** 0.5
            for name in members:
                total[name] += gradient[name] * min(1.0, limit / norm)
        private.clipped(gradient, 0.5, per)
        assert sum(float(value.pow(2).sum()) for value in gradient.values()) ** 0.5 <= 0.5 * (1 + 1e-5)
    for name, value in one.parameters.items():
        assert torch.allclose(value.grad, total[name] / 3, atol=1e-6), name


def test_without_noise_and_limit_like_sequences_have_the_gradient_of_their_batch():
    one, inputs = stage(), batch(3)
    policy = made({"clip": 1e9, "noise": 0.0})
    with torch.no_grad():
        policy.before_step(one)
        policy.loss(one, inputs, lambda: torch.zeros(()))
        policy.gradients(one)
    for name, gradient in one.gradient(inputs).items():
        assert torch.allclose(one.parameters[name].grad, gradient, atol=1e-5), name


def test_short_gradients_stay_as_they_are():
    gradient = {"a.lora_A.default.weight": torch.tensor([0.3]), "a.lora_B.default.weight": torch.tensor([0.4])}
    private.clipped(gradient, 0.5, "module")
    assert [float(value) for value in gradient.values()] == pytest.approx([0.3, 0.4])
    private.clipped(gradient, 0.25, "module")
    assert [float(value) for value in gradient.values()] == pytest.approx([0.15, 0.2])


def test_the_noise_has_the_size_of_the_limit():
    one, inputs = stage(), batch(2)
    found = []
    for noise in (0.0, 3.0):
        policy = made({"clip": 0.5, "noise": noise})
        one.numbers = {}
        with torch.no_grad():
            policy.before_step(one)
            policy.loss(one, inputs, lambda: torch.zeros(()))
            policy.gradients(one)
        found.append(torch.cat([value.grad.view(-1) for value in one.parameters.values()]))
    assert float((found[1] - found[0]).std()) == pytest.approx(3.0 * 0.5 / 2, rel=0.01)


@pytest.mark.parametrize("form", ["full", "lora:rank=4"])
def test_without_noise_and_limit_it_is_training_by_sequences(form, tmp_path, llama_folder):
    alone = {"batch_sequences": 1, "micro_batch_sequences": 1}  # then the mean over tokens is the same
    settings = {"choose": blocks, "form": form, **alone}
    ran = run(tmp_path / "a", llama_folder, {"method": "private", "noise": 0.0, "clip": 1e9}, **settings)
    plain = run(tmp_path / "b", llama_folder, **settings)
    assert all(torch.allclose(ran.after[name], plain.after[name], atol=1e-4) for name in plain.after)
    assert not same(plain.after, plain.begun)


def test_the_account_is_that_of_constant_noise_and_meets_the_budget():
    from opacus import accountants

    one = stage(rows=40)
    one.steps, one.batch_sequences = 50, 4
    policy = made({"epsilon": 3.0})
    policy.before_step(one)
    spent = [policy.spent(one, steps) for steps in (1, 25, 50)]
    assert spent == sorted(spent) and 2.8 < spent[-1] <= 3.0
    accountant = accountants.RDPAccountant()
    for _ in range(25):
        accountant.step(noise_multiplier=one.numbers["noise"], sample_rate=0.1)
    assert accountant.get_epsilon(1e-5) == pytest.approx(spent[1], rel=1e-9)
    assert made({"epsilon": 1.0}).multiplier(one) > one.numbers["noise"]


def test_noise_on_embeddings_has_the_right_length():
    drawn = private.noise((4000, 8), 2.0, torch.Generator().manual_seed(0))
    length = drawn.norm(dim=-1)
    assert float(length.mean()) == pytest.approx(8 / 2.0, rel=0.03)
    assert float(length.var()) == pytest.approx(8 / 4.0, rel=0.08)
    assert drawn.mean(0).norm() < 0.15


def test_noise_on_embeddings_is_used_and_fades(tmp_path, llama_folder):
    settings = {"method": "private", "noise": 0.0, "clip": 1e9}
    plain = run(tmp_path / "a", llama_folder, settings)
    little = run(tmp_path / "b", llama_folder, {**settings, "embedding_noise": 1e9})
    much = run(tmp_path / "c", llama_folder, {**settings, "embedding_noise": 10.0})
    assert all(torch.allclose(little.after[name], plain.after[name], atol=1e-3) for name in plain.after)
    assert not all(torch.allclose(much.after[name], plain.after[name], atol=1e-3) for name in plain.after)
