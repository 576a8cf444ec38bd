"""The router of domains: the faithful-if lines of the card."""

import pytest
import torch

from selectune.errors import UserError
from selectune.inference.domain_router import DomainRouter, Mixture, features
from tests.tiny import tiny


def domain(place, count=60, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed + place)
    centre = 4 * torch.randn(width, generator=torch.Generator().manual_seed(100 + place))
    return centre + torch.randn(count, width, generator=generator)


def test_drawn_features_have_the_stored_mean_and_covariance():
    mixture = Mixture.of(domain(0, 400, 3), components=1)
    drawn = mixture.sample(200_000, torch.Generator().manual_seed(0)).double()
    assert torch.allclose(drawn.mean(0), mixture.means[0], atol=0.02)
    assert torch.allclose(torch.cov(drawn.t()), mixture.covariances[0], atol=0.03)
    two = Mixture.of(torch.cat([domain(0, 200, 3), domain(1, 100, 3)]))
    assert sorted(two.weights.tolist()) == pytest.approx([1 / 3, 2 / 3], abs=0.02)


def test_each_batch_has_its_share_of_new_features():
    router = DomainRouter(batch=60)
    own, generator = torch.full((10, 2), 7.0), torch.Generator().manual_seed(0)
    inputs, labels = router.compose(own, [(0, torch.zeros(10, 2)), (1, torch.ones(10, 2))], 20, generator)
    assert len(inputs) == 60 and (labels == 2).sum() == 20
    assert (inputs[labels == 2] == 7).all() and (inputs[labels == 0] == 0).all() and (inputs[labels == 1] == 1).all()
    seen = []
    router.compose = lambda own, before, fresh, generator: (
        seen.append((len(before), fresh)) or DomainRouter.compose(router, own, before, fresh, generator)
    )
    for place in range(3):
        router.add(f"domain {place}", domain(place))
    assert set(seen) == {(0, 60), (1, 30), (2, 20)}


def test_domains_that_came_before_are_still_known_and_none_of_their_data_is_kept():
    router = DomainRouter(reduced=8)
    for place in range(4):
        given = domain(place)
        router.add(str(place), given)
        given.fill_(float("nan"))  # whoever looks at it again sees nothing
    for place in range(4):
        found = router.choose(domain(place, seed=1000))
        assert sum(name == str(place) for name in found) >= 57
    kept = sum(one.means.numel() + one.covariances.numel() + one.weights.numel() for one in router.mixtures)
    assert kept == 4 * 2 * (8 + 64 + 1)


def test_one_domain_is_the_only_answer_and_files_come_back(tmp_path):
    router = DomainRouter()
    with pytest.raises(UserError, match="no domain yet"):
        router.choose(domain(0))
    router.add("general", domain(0))
    assert set(router.choose(domain(3))) == {"general"}
    router.add("law", domain(1))
    router.save(tmp_path / "router.safetensors")
    again = DomainRouter.load(tmp_path / "router.safetensors")
    test = torch.cat([domain(0, seed=9), domain(1, seed=9)])
    assert again.choose(test) == router.choose(test)
    again.add("care", domain(2))
    router.add("care", domain(2))
    assert torch.equal(again.weight, router.weight)
    for wrong, values, why in (("law", domain(1), "already"), ("new", domain(1, 1), "at least 2")):
        with pytest.raises(UserError, match=why):
            router.add(wrong, values)


def test_features_are_mean_states_side_by_side():
    model = tiny("llama")
    found = features(model, [[5, 9, 17], [30, 12, 8, 44]], depths=(0.5, 1.0))
    states = model(input_ids=torch.tensor([[30, 12, 8, 44]]), output_hidden_states=True).hidden_states
    assert torch.allclose(found[1], torch.cat([states[2][0].mean(0), states[4][0].mean(0)]), atol=1e-5)
    assert found.shape == (2, 128)


def test_of_a_prompt_that_the_context_does_not_hold_the_end_is_read():
    model, prompt = tiny("gpt2", n_positions=16), list(range(3, 60))
    assert torch.equal(features(model, [prompt]), features(model, [prompt[-16:]]))
