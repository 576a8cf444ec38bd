"""DEALRec: the recursion against a solve, gradients and curvature against autograd, the spread against its definition."""

import numpy as np
import pytest
import torch

from selectune.data import Message, Record
from selectune.examples.deal_rec import InfluenceAndEffort, Surrogate, inverse_product
from selectune.examples.factors.curvature import moved_slope
from selectune.examples.factors.last_block import Effort, gradients_at, last_linear, pieces_of
from selectune.examples.factors.store import measure
from selectune.examples.method import ranked
from tests.examples.test_signals import RECORDS, pool


def own_loss(model, made, record):
    """The model's own mean response loss, with a graph."""
    (piece,) = made.encoder.encode(record)
    labels = torch.tensor([[-100, *piece.labels[1:]]])
    return model(input_ids=torch.tensor([piece.input_ids]), labels=labels, use_cache=False).loss


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_gradients_at_a_layer_and_effort_are_autograds(tiny_folders, architecture):
    made = pool(tiny_folders[architecture])
    found, model = measure(made, Effort(rank=4)), made.base.model
    layer = last_linear(made.base, "value")
    weight = model.get_submodule(layer.module).weight
    _, pieces, counts = pieces_of(made.worker(), RECORDS[:5])
    inner = {number: outward.T @ inward for number, _, inward, outward in gradients_at(made.worker(), pieces, layer)}
    for number in range(5):
        weight.requires_grad_(True)
        (slope,) = torch.autograd.grad(own_loss(model, made, RECORDS[number]), weight)
        weight.requires_grad_(False)
        slope = slope.T if architecture == "gpt2" else slope
        slope = slope if layer.outputs is None else slope[layer.outputs]
        assert torch.allclose(inner[number] / counts[number], slope, atol=1e-5)
        side = Effort(rank=4).input_side(slope.shape[1])
        assert found[number] == pytest.approx(float((slope @ side.T).norm()), rel=1e-3)
    assert not any(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_curvature_and_influence_are_those_of_the_whole_matrix(tiny_folders, architecture):
    made = pool(tiny_folders[architecture], RECORDS[:5])
    surrogate, model = Surrogate(made), made.base.model
    weight = model.get_submodule(surrogate.layer.module).weight
    assert surrogate.layer.module.endswith(
        {"llama": "3.mlp.down_proj", "gpt2": "mlp.c_proj", "gemma2": "mlp.down_proj"}[architecture]
    )

    def turned(matrix):
        return matrix.T if architecture == "gpt2" else matrix

    slopes = []
    for record in RECORDS[:5]:
        weight.requires_grad_(True)
        slopes.append(turned(torch.autograd.grad(own_loss(model, made, record), weight)[0]))
        weight.requires_grad_(False)
    assert torch.allclose(surrogate.mean_gradient(RECORDS[:5]), torch.stack(slopes).mean(0), atol=1e-5)
    direction = torch.randn(slopes[0].shape, generator=torch.Generator().manual_seed(0))
    expected = [float((slope * direction).sum()) for slope in slopes]
    assert surrogate.along(RECORDS[:5], direction) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    product, plain, step = surrogate.hessian_product(RECORDS[2], direction), weight.detach().clone(), 1e-3
    with torch.no_grad():
        weight += step * turned(direction)
    moved = surrogate.mean_gradient(RECORDS[2:3])
    with torch.no_grad():
        weight.copy_(plain - step * turned(direction))
    difference = (moved - surrogate.mean_gradient(RECORDS[2:3])) / (2 * step)
    with torch.no_grad():
        weight.copy_(plain)
    assert torch.nn.functional.cosine_similarity(product.flatten(), difference.flatten(), dim=0) > 0.999
    assert float(product.norm() / difference.norm()) == pytest.approx(1, abs=0.02)


def test_of_records_that_are_asked_for_often_only_the_last_block_is_computed_again(llama_folder):
    made = pool(llama_folder, RECORDS[:5])
    direction = torch.randn(Surrogate(made).mean_gradient(RECORDS[:5]).shape, generator=torch.Generator().manual_seed(0))
    met: list[int] = []
    made.base.model.get_submodule(made.base.anatomy.blocks[0].prefix + ".mlp.up_proj").register_forward_hook(
        lambda *_: met.append(1)
    )
    found, passes = {}, {}
    for often in ((), made.keys[:5], made.keys[:2]):
        surrogate, marks = Surrogate(made, often), [len(met)]
        found[len(often)] = [surrogate.mean_gradient(RECORDS[:5])]
        marks.append(len(met))
        found[len(often)] += [surrogate.hessian_product(RECORDS[place], direction) for place in (1, 0, 1)]
        marks.append(len(met))
        found[len(often)] += [torch.tensor(surrogate.along(RECORDS[:5], direction))]
        passes[len(often)] = np.diff([*marks, len(met)]).tolist()
    full = passes[0][0]
    assert passes[0] == [full, 3, full] and passes[2][:2] == passes[5][:2] == [full, 0]
    assert full > passes[2][2] > passes[5][2]  # what is left tries the attention out
    for some in (5, 2):
        for one, other in zip(found[some], found[0], strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("finish", [lambda raw: raw, lambda raw: torch.tanh(raw / 3) * 3, lambda raw: raw * 0.25])
def test_the_slope_of_a_loss_in_logits_and_how_it_moves_are_autograds(finish):
    source = torch.Generator().manual_seed(0)
    raw, moving = torch.randn(2, 5, 11, generator=source, dtype=torch.float64) * 3
    targets = torch.randint(11, (5,), generator=source)

    def slope(some):
        return torch.func.grad(lambda one: torch.nn.functional.cross_entropy(finish(one), targets, reduction="sum"))(some)

    for found, expected in zip(moved_slope(finish, raw, moving, targets), torch.func.jvp(slope, (raw,), (moving,)), strict=True):
        assert torch.allclose(found, expected, atol=1e-9)


def test_the_recursion_ends_at_the_damped_inverse_and_a_small_scale_is_raised():
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(6, 6, generator=generator)
    hessian, gradient = root @ root.T, torch.randn(6, generator=generator)
    largest = float(torch.linalg.eigvalsh(hessian)[-1])
    samples = np.zeros(4000, dtype=np.int64)
    for scale in (2 * largest, largest / 8):
        found, used = inverse_product(lambda _, h: hessian @ h, gradient, samples, 0.01, scale)
        assert (used == scale) == (scale > largest) and used > largest / 2
        exact = used * torch.linalg.solve(hessian + 0.01 * used * torch.eye(6), gradient)
        assert torch.allclose(found, exact, rtol=1e-3, atol=1e-3)


def test_each_step_takes_the_next_sample_and_begins_where_the_gradient_is():
    gradient = torch.tensor([1.0, -2.0])
    found, _ = inverse_product(lambda sample, h: h * (sample + 1), gradient, np.array([0, 2]), 0.1, 10)
    first = gradient + 0.9 * gradient - gradient / 10
    assert torch.allclose(found, gradient + 0.9 * first - 3 * first / 10)


def test_influence_is_along_the_inverse_product_and_score_adds_effort(llama_folder):
    made, method = pool(llama_folder), InfluenceAndEffort(count=4, steps=3, effort=0.3)
    surrogate, each = Surrogate(made), [made.records[place] for place in made.order]
    samples = made.generator("deal_rec").integers(len(made), size=3)
    solved, _ = inverse_product(
        lambda sample, h: surrogate.hessian_product(each[sample], h), surrogate.mean_gradient(each), samples, 0.01, 25.0
    )
    expected = surrogate.along(list(made.records), solved)
    signals = method.choose(made).signals
    assert signals["influence"] == pytest.approx(expected, rel=1e-3, abs=1e-4 * np.abs(expected).max())
    parts = [(one - one.min()) / np.ptp(one) for one in (signals["influence"], signals["effort"])]
    assert signals["score"] == pytest.approx(parts[0] + 0.3 * parts[1])


def test_groups_of_the_range_are_filled_from_the_smallest_and_the_hardest_come_last(llama_folder):
    made = pool(llama_folder)
    method = InfluenceAndEffort(count=4, groups=3, hardest=0.1)
    score = np.array([0.0, 0.1, 0.2, 0.3, 0.1, 0.2, 1.4, 2.9, 3.0, 9.0])
    places = method.spread(made, score)
    assert sorted(places.tolist()) == list(range(10)) and places[-1] == 9
    assert {6, 7, 8} - set(places[:4].tolist()) in ({7}, {8}, set()) and 6 in places[:4]
    even = InfluenceAndEffort(count=4, hardest=0.0)
    assert np.array_equal(even.spread(made, np.ones(10)), ranked(made, made.uniform("deal_rec")))  # one group, at random
    other = pool(llama_folder, seed=1)
    assert not np.array_equal(even.spread(other, np.ones(10)), even.spread(made, np.ones(10)))
    halves = InfluenceAndEffort(count=2, groups=2, hardest=0.0).spread(made, np.array([0.0] * 4 + [0.45] * 5 + [1.0]))
    assert 9 in halves[:2]  # alone in the upper half of the range
    with_effort, without = (InfluenceAndEffort(count=4, groups=3, steps=5, effort=e).choose(made) for e in (0.5, 0))
    assert np.ptp(without.signals["score"]) == pytest.approx(1)
    assert np.allclose(without.signals["influence"], with_effort.signals["influence"])
    assert not np.allclose(without.signals["score"], with_effort.signals["score"])


def test_what_has_nothing_to_learn_has_no_score_and_comes_last(llama_folder):
    unread = [Record("chat", (Message("user", "lamp " * 300 + str(n)), Message("assistant", "on"))) for n in range(3)]
    made = pool(llama_folder, [*unread, *RECORDS])
    choice = InfluenceAndEffort(count=10, steps=3, groups=3).select(made)
    assert min(choice.places) == 3 and np.isnan(choice.signals["score"][:3]).all() and "3 records" in made.notes[-1]
    assert sorted(InfluenceAndEffort(count=10).spread(made, np.full(13, np.nan)).tolist()) == list(range(13))
