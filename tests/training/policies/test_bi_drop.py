"""Dropout passes over one batch decide what is updated, and by how much."""

import pytest
import torch
from transformers import TrainerCallback

from selectune.models import Anatomy
from selectune.training.policies import bi_drop
from selectune.training.policies.dropout import branches, dropping
from selectune.training.policies.none import Nothing
from tests.tiny import ARCHITECTURES, tiny
from tests.training.policies.running import blocks, run, same
from tests.training.policies.staged import make, stage


def test_the_chosen_entries_are_the_top_of_the_factors():
    draw = torch.Generator().manual_seed(0)
    votes, weight = torch.randn(3, 4, 5, generator=draw), torch.randn(4, 5, generator=draw)
    scores = []
    for i in range(20):
        three = [float(votes[j].view(-1)[i]) for j in range(3)]
        mean = sum(three) / 3
        spread = (sum((v - mean) ** 2 for v in three) / 3) ** 0.5
        scores.append((abs(mean) / spread, abs(mean) / abs(float(weight.view(-1)[i]))))
    means = [sum(pair[k] for pair in scores) / 20 for k in (0, 1)]
    total = [a / means[0] + b / means[1] for a, b in scores]
    expected = sorted(range(20), key=lambda i: -total[i])[:10]
    assert sorted(expected) == bi_drop.chosen(votes, weight, 0.5).view(-1).nonzero().squeeze(-1).tolist()
    assert bi_drop.chosen(votes[:1].repeat(2, 1, 1), weight, 0.5).all()


def test_without_dropout_everything_is_updated_whatever_rounding_does():
    one, policy = stage(), make("bi_drop:dropout=0")
    policy.begin(one)
    policy.before_step(one)
    weight = one.parameters["model.layers.0.mlp.up_proj.weight"]
    noise = 1e-6 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
    one.passing["again"].append(lambda sub_network: ((1 + sub_network * noise) * weight).sum())
    one.passing["again"][0](0).backward()
    assert all(bool(factor.all()) for factor in policy.factors(one).values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_reaches_both_branches_of_every_block(architecture):
    model = tiny(architecture)
    assert len(branches(model)) == 2 * len(Anatomy.of(model).blocks)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        plain = model(ids).logits
        with dropping(branches(model), 0.5, torch.Generator().manual_seed(0)):
            one = model(ids).logits
        with dropping(branches(model), 0.5, torch.Generator().manual_seed(0)):
            again = model(ids).logits
        assert torch.equal(one, again) and not torch.allclose(one, plain)
        assert torch.equal(model(ids).logits, plain)


def test_what_is_dropped_is_zero_and_the_rest_scaled():
    layer = torch.nn.Identity()
    with dropping([layer], 0.25, torch.Generator().manual_seed(0)):
        found = layer(torch.ones(100, 100))
    assert found.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs(float((found == 0).float().mean()) - 0.25) < 0.02


class Watch(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})


def test_the_update_is_made_with_the_mean_gradient(tmp_path, llama_folder, monkeypatch):
    votes = []
    monkeypatch.setattr(bi_drop, "chosen", lambda found, weight, *rest: votes.append(found) or torch.ones_like(weight))
    watch = Watch()
    run(tmp_path, llama_folder, "bi_drop:passes=3", choose=blocks, watching=[watch], steps=1, clip_norm=None, evaluations=0)
    for found, gradient in zip(votes, watch.gradients[0].values(), strict=True):
        assert len(found) == 3 and not torch.equal(found[0], found[1])
        assert torch.equal(gradient, found.mean(0))


def test_one_pass_that_keeps_all_is_training_with_dropout(tmp_path, llama_folder, monkeypatch):
    plain = run(tmp_path / "plain", llama_folder)
    dropped = run(tmp_path / "one", llama_folder, "bi_drop:passes=1,dropout=0.2")
    assert not same(plain.after, dropped.after)
    assert same(dropped.after, run(tmp_path / "keep", llama_folder, "bi_drop:passes=1,dropout=0.2,keep=1").after)
    steps = []

    def loss(self, stage, batch, plain):
        steps.append(stage.step)
        with dropping(branches(stage.whole.causal), 0.2, stage.generator(f"0/{steps.count(stage.step) - 1}/0")):
            return plain()

    monkeypatch.setattr(Nothing, "loss", loss)
    by_hand = run(tmp_path / "dropout", llama_folder, prefix_cache=False)
    assert all(torch.allclose(dropped.after[name], value, atol=1e-6) for name, value in by_hand.after.items())
