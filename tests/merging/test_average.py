"""lo-fi: the faithful-if lines of the card."""

import pytest
import torch

from selectune.errors import UserError
from selectune.merging.average import average, barrier, put
from tests.tiny import tiny


def moved(seed, scale=1e-2):
    model = tiny("llama")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value += scale * torch.randn(value.shape, generator=generator)
    return model


def test_one_or_equal_specialists_are_their_own_mean():
    one = moved(1)
    for models in ([one], [one, moved(1), moved(1)]):
        found = average(models)
        assert all(torch.equal(found[name], value) for name, value in one.named_parameters())


def test_the_mean_is_weighted_and_its_order_does_not_matter():
    models = [moved(seed) for seed in range(3)]
    found, other = average(models, [1, 2, 5]), average(models[::-1], [5, 2, 1])
    for name, value in found.items():
        expected = sum(share * model.get_parameter(name).double() for share, model in zip((1, 2, 5), models)) / 8
        assert torch.allclose(value.double(), expected, atol=1e-7)
        assert torch.equal(value, other[name])


def test_one_step_of_each_is_one_step_together():
    ids = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(0))

    def stepped(rows):
        model = tiny("llama", dtype=torch.float64)
        model(input_ids=ids[rows], labels=ids[rows]).loss.backward()
        with torch.no_grad():
            for value in model.parameters():
                value -= 1e-2 * value.grad
        return model

    apart, together = average([stepped([0, 1]), stepped([2, 3])]), stepped([0, 1, 2, 3])
    assert all(torch.allclose(apart[name], value, atol=1e-9) for name, value in together.named_parameters())
    assert not all(
        torch.allclose(value, together.get_parameter(name), atol=1e-9) for name, value in stepped([0, 1]).named_parameters()
    )


def test_the_barrier_is_the_excess_over_the_straight_line():
    models = [moved(seed, 0.1) for seed in range(2)]
    scratch = tiny("llama")

    def loss(model):
        share = float(
            (model.lm_head.weight - models[0].lm_head.weight).norm()
            / (models[1].lm_head.weight - models[0].lm_head.weight).norm()
        )
        return 2 + share + (3.0 if 0.4 < share < 0.6 else 0.0)

    assert barrier(scratch, *models, loss) == pytest.approx(3.0, abs=1e-3)
    assert barrier(scratch, models[0], models[0], lambda model: 1.0) == 0
    put(scratch, average([models[1]]))
    assert all(torch.equal(value, models[1].get_parameter(name)) for name, value in scratch.named_parameters())


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(UserError, match="nothing to average"):
        average([])
    with pytest.raises(UserError, match="one base"):
        average([tiny("llama"), tiny("gpt2")])
    for wrong in ([1.0], [0.0, 0.0], [-1.0, 2.0]):
        with pytest.raises(UserError, match="weights for 2"):
            average([moved(0), moved(1)], wrong)
