"""Recovery of a direction: the faithful-if lines of the card, against an obvious re-computation."""

import copy

import pytest
import torch

from selectune.errors import UserError
from selectune.merging.recovery import Recovery, candidates, direction, gradients, recover
from selectune.models.anatomy import Anatomy
from tests.tiny import tiny

PROBES = [[5, 9, 17, 30], [8, 12, 40, 3, 22], [60, 61, 7]]
TASK = [[100, 101, 102], [7, 33, 90, 12]]
SETTINGS = Recovery(block=3, rate=0.01, steps=6, warm_up=2, every=2, batch=2)


def pair(scale=0.1):
    base = tiny("llama")
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "layers" in name:
                value += scale * value.std().nan_to_num(0.1) * torch.randn(value.shape, generator=generator)
    return base, model


def eligible(model):
    return [name for block in Anatomy.of(model).blocks[:3] for name in block.parameters if "norm" not in name]


def test_every_weight_is_the_bases_or_the_specialists_and_the_rest_is_untouched():
    base, model = pair()
    before = {name: value.clone() for name, value in model.named_parameters()}
    done = recover(model, base, PROBES, TASK, lambda model: 1.0, SETTINGS)
    originals, returned = dict(base.named_parameters()), 0
    for name, value in model.named_parameters():
        if name in eligible(model):
            assert ((value == before[name]) | (value == originals[name])).all()
            returned += int((value != before[name]).sum())
        else:
            assert torch.equal(value, before[name]), name
    assert 0 < returned == done.returned
    assert done.steps == 6 and not done.rolled_back and len(done.measures) == 3
    assert done.similarities[-1] > done.similarities[0]


def test_the_first_step_is_the_rule_by_hand():
    base, model = pair()
    values = {name: value.clone() for name, value in model.named_parameters()}
    wanted = direction(base, PROBES, SETTINGS)
    gradient = {name: torch.zeros_like(value) for name, value in values.items()}
    for batch in (PROBES[:2], PROBES[2:]):
        model.zero_grad()
        model.requires_grad_(True)
        states = [model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0, -1] for ids in batch]
        (-torch.nn.functional.cosine_similarity(sum(states) / len(states), wanted, dim=0)).backward()
        for name, value in model.named_parameters():
            gradient[name] += value.grad if value.grad is not None else 0
    rows = []
    for name in eligible(model):
        change = values[name] - base.get_parameter(name)
        for place in range(change.numel()):
            slope = float(gradient[name].view(-1)[place])
            if slope * float(change.view(-1)[place]) > 0:
                rows.append((-abs(slope), name, place))
    count = -(-sum(v.numel() for n, v in values.items() if "layers" in n) * 0.01 // 1)
    expected = {(name, place) for _, name, place in sorted(rows)[: int(count)]}
    model.requires_grad_(False)
    recover(model, base, PROBES, TASK, lambda model: 1.0, Recovery(block=3, rate=0.01, steps=1, every=1, batch=2))
    found = {
        (name, int(place)) for name in eligible(model) for place in (model.get_parameter(name) != values[name]).view(-1).nonzero()
    }
    assert len(found ^ expected) <= 4  # places whose slopes differ by rounding
    assert len(found) == int(count)


@torch.no_grad()
def test_with_everything_returned_the_directions_are_one():
    base, model = pair()
    for name, value in model.named_parameters():
        if any(name.startswith(f"model.layers.{block}.") for block in range(3)):
            value.copy_(base.get_parameter(name))
    assert torch.equal(direction(model, PROBES, SETTINGS), direction(base, PROBES, SETTINGS))
    with torch.enable_grad():
        _, similarity = gradients(model, [PROBES[0]], direction(base, [PROBES[0]], SETTINGS), eligible(model), SETTINGS)
    assert similarity == pytest.approx(1.0, abs=1e-5)


def test_all_that_helps_brings_the_directions_together_to_first_order():
    base, model = (one.double() for one in pair())
    wanted, names, originals = direction(base, PROBES, SETTINGS), eligible(model), dict(base.named_parameters())
    gradient, before = gradients(model, PROBES, wanted, names, SETTINGS)
    values = {name: value for name, value in model.named_parameters() if name in names}
    returned = candidates({name: value.detach() for name, value in values.items()}, originals, gradient, 10**9)
    rise = 0.0
    with torch.no_grad():
        for name, mask in returned.items():
            way = 1e-5 * mask * (originals[name] - values[name])
            rise -= float((gradient[name] * way).sum())
            values[name].add_(way)
    _, after = gradients(model, PROBES, wanted, names, SETTINGS)
    batches = -(-len(PROBES) // SETTINGS.batch)
    assert after > before and (after - before) * batches == pytest.approx(rise, rel=0.02)


def test_where_the_task_suffers_some_are_given_back_and_the_last_good_checkpoint_stays():
    base, model = pair()
    before = {name: value.clone() for name, value in model.named_parameters()}

    def measure(model):  # falls with every weight that returned
        changed = sum(int((value != before[name]).sum()) for name, value in model.named_parameters())
        return 1.0 - changed / 8000

    one = copy.deepcopy(model)
    done = recover(one, base, PROBES, TASK, measure, SETTINGS)
    assert done.rolled_back and measure(one) > 0.95
    assert done.measures[-1] <= 0.95 and done.steps == 2 * (len(done.measures) - 1)
    two = copy.deepcopy(model)
    hard = recover(two, base, PROBES, TASK, lambda model: -float(measure(model) < 1.0), SETTINGS)
    assert hard.steps == 0 and hard.returned == 0
    assert all(torch.equal(value, before[name]) for name, value in two.named_parameters())


def test_only_changes_that_help_are_candidates():
    values = {"a": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    masks = candidates(values, {"a": torch.zeros(4)}, {"a": torch.tensor([0.5, -9.0, 0.7, 3.0])}, 4)
    assert masks["a"].tolist() == [True, False, True, False]


@pytest.mark.parametrize("count", [1, 5, 9, 99])
def test_of_the_changes_that_help_those_with_the_largest_slopes_return_and_ties_go_by_place(count):
    generator = torch.Generator().manual_seed(0)
    changes, slopes = (
        {name: torch.randint(-3, 4, shape, generator=generator).float() for name, shape in (("a", (6, 5)), ("b", (7,)))}
        for _ in range(2)
    )
    helpful = []
    for name, change in changes.items():
        for place, (way, slope) in enumerate(zip(change.view(-1).tolist(), slopes[name].view(-1).tolist(), strict=True)):
            if way * slope > 0:
                helpful.append((-abs(slope), name, place))
    masks = candidates(changes, {name: torch.zeros_like(change) for name, change in changes.items()}, slopes, count)
    found = {(name, place) for name, mask in masks.items() for place in mask.view(-1).nonzero().squeeze(-1).tolist()}
    assert found == {(name, place) for _, name, place in sorted(helpful)[:count]}


def test_of_a_prompt_that_the_context_does_not_hold_the_end_is_read():
    model, prompt = tiny("gpt2", n_positions=16), list(range(3, 60))
    assert torch.equal(direction(model, [prompt], SETTINGS), direction(model, [prompt[-16:]], SETTINGS))


def test_a_block_that_is_not_there_is_refused():
    base, model = pair()
    with pytest.raises(UserError, match="no block 4"):
        recover(model, base, PROBES, TASK, lambda model: 1.0, Recovery(block=4))
