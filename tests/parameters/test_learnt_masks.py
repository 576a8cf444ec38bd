"""Masks that are learnt: between a base and its tuned copy, and from what moves in turns with general conversations."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from selectune import catalogue
from selectune.models import load_base
from selectune.parameters import Selection
from selectune.parameters.factors.gradients import first, rows_of
from selectune.parameters.factors.targets import targets
from selectune.parameters.factors.trial import trial
from selectune.parameters.fedselect import averaged, grow
from selectune.parameters.freeze_as_guard import interpolate, learn
from tests.contracts.test_parameters import RECORDS, context


def made(name, **values):
    return catalogue.create("parameters", {"method": name, **values})


@pytest.fixture
def base(llama_folder):
    return load_base(llama_folder)


# -- between a base and its tuned copy -------------------------------------------------------------------------------


def tuned_copy(base):
    names = [target.name for target in targets(base)]
    return names, trial(context(base), Selection.of(base.model, names), steps=2, learning_rate=1e-2)


def test_a_mask_of_one_is_the_base_and_of_zero_the_tuned_copy(base):
    names, tuned = tuned_copy(base)
    weights = dict(copy.deepcopy(base.model).named_parameters())
    for share, wanted in ((1.0, tuned.start), (0.0, tuned.trained)):
        interpolate(weights, names, tuned, torch.full((len(names),), share, dtype=torch.float64))
        assert all(torch.equal(weights[name], wanted[name]) for name in names)


@pytest.mark.parametrize("aim", ["protect", "resist"])
def test_the_masks_gradient_is_autograds(base, aim):
    names, tuned = tuned_copy(base)
    asked = context(base)
    mask = torch.linspace(0.1, 0.9, len(names), dtype=torch.float64)
    found = made("freeze_as_guard", aim=aim, examples=2, general_weight=0.5).gradient(asked, names, tuned)(mask, 0)
    leaf = mask.clone().requires_grad_()
    weights = {
        name: tuned.trained[name].detach() + leaf[i].float() * (tuned.start[name] - tuned.trained[name].detach())
        for i, name in enumerate(names)
    }
    total = 0.0
    for records, sign in ((asked.train, 1.0 if aim == "protect" else -1.0), (asked.general, 0.5)):
        row = rows_of(asked, first(records, 2), packed=True)[0]
        starts = [*(row["position_ids"] == 0).nonzero().squeeze(-1).tolist(), len(row["input_ids"])]
        terms, count = 0.0, 0
        for start, end in pairwise(starts):  # each record by itself
            ids, labels = row["input_ids"][start:end], row["labels"][start:end]
            logits = torch.func.functional_call(base.model, weights, kwargs={"input_ids": ids[None]}).logits[0, :-1]
            terms = terms + torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
            count += int((labels[1:] != -100).sum())
        total = total + sign * terms / count
    total.backward()
    assert torch.allclose(found, leaf.grad, rtol=2e-2, atol=1e-4 * float(leaf.grad.abs().max()))


def test_a_strong_pull_freezes_the_asked_share_and_the_loss_decides_which():
    harm = torch.linspace(-1, 1, 20, dtype=torch.float64)
    for frozen in (0.2, 0.5):
        mask = learn(lambda mask, step: harm, torch.ones(20), steps=4000, rate=0.005, frozen=frozen, pull=50.0)
        assert float(mask.mean()) == pytest.approx(frozen, abs=0.05)
    mask = learn(lambda mask, step: harm, torch.ones(20), steps=2000, rate=0.05, frozen=0.5, pull=1.0)
    assert (mask[:5] > 0.5).all() and (mask[-5:] < 0.5).all()


def test_the_stronger_the_pull_the_nearer_the_frozen_share_is_to_the_one_asked_for():
    harm, far = torch.linspace(-1, 1, 20, dtype=torch.float64), []
    for pull in (0.0, 1.0, 20.0):
        mask = learn(lambda mask, step: harm, torch.ones(20), steps=800, rate=0.02, frozen=0.2, pull=pull)
        far.append(abs(float((mask > 0.5).double().mean()) - 0.2))
    assert far == sorted(far, reverse=True) and far[0] > 0.2 and far[-1] <= 0.05


def test_a_tensors_size_does_not_set_its_pace():
    """The inner product that is the mask's gradient grows with the entries; by entry all are alike. Few steps are enough."""
    harm, sizes = torch.linspace(-1, 1, 20, dtype=torch.float64), torch.tensor([1.0, 800.0] * 10, dtype=torch.float64)
    mask = learn(lambda mask, step: harm * sizes, sizes, steps=50, rate=0.05, frozen=0.5, pull=5.0)
    assert (mask.diff() < 0).all() and float(mask.mean()) == pytest.approx(0.5, abs=0.02)


# -- grown in turns --------------------------------------------------------------------------------------------------


def test_masks_grow_by_the_most_moved_free_entries_up_to_the_bound():
    source = torch.Generator().manual_seed(0)
    change, mask = torch.randn(6, 10, generator=source), torch.zeros(6, 10, dtype=torch.bool)
    sizes = []
    for _ in range(8):
        free = sorted((i for i in range(60) if not mask.view(-1)[i]), key=lambda i: -abs(float(change.view(-1)[i])))
        grown = grow(mask, change, 0.2, 0.3)
        added = set((grown & ~mask).view(-1).nonzero().squeeze(-1).tolist())
        if float(mask.float().mean()) <= 0.3:
            assert added == set(free[: int(0.2 * len(free))])
        else:
            assert not added
        assert (grown | mask).equal(grown)
        mask = grown
        sizes.append(int(mask.sum()))
    assert sizes[:3] == [12, 21, 21]
    assert grow(mask, change, 0.0, 1.0).equal(mask)


def test_averages_are_over_those_that_share():
    one, two = torch.tensor([1.0, 2, 3]), torch.tensor([5.0, 6, 7])
    masks = [torch.tensor([False, True, True]), torch.tensor([False, False, True])]
    assert averaged([one, two], masks).tolist() == [3, 6, 0]


def test_shared_entries_are_the_same_after_each_round_and_nothing_else_moves(base):
    method = made("fedselect", steps=2, rounds=2, examples=4, share=0.1)
    names = [target.name for target in targets(base)]
    masks, models = method.play(context(base), names, [RECORDS[:3], RECORDS[3:]])
    own = 0
    for name in names:
        one, two = (model.get_parameter(name) for model in models)
        shared = ~masks[0][name] & ~masks[1][name]
        assert torch.equal(one[shared], two[shared])
        own += int((one != two).sum())
        assert masks[0][name].float().mean() == pytest.approx(0.19, abs=0.01)
    assert own > 0
    for name, value in models[0].named_parameters():
        assert torch.equal(value, base.model.get_parameter(name)) != (name in names)


def test_a_phase_moves_its_entries_alone(base):
    method = made("fedselect", steps=2, examples=4)
    names = [target.name for target in targets(base)]
    masks = {
        name: torch.rand(base.model.get_parameter(name).shape, generator=torch.Generator().manual_seed(1)) < 0.3 for name in names
    }
    for personal in (True, False):
        model = method.phase(context(base), base.model, masks, RECORDS, personal, 0)
        for name in names:
            moved = model.get_parameter(name) != base.model.get_parameter(name)
            assert not moved[~masks[name] if personal else masks[name]].any() and moved.any()


def alone(base, model, names, records, seed):
    """A client's phase without a mask."""
    theirs = context(replace(base, model=model))
    return trial(
        theirs, Selection.of(model, names), records=records, steps=1, learning_rate=1e-2, optimiser="sgd", seed=seed
    ).model


def test_with_nothing_personal_it_is_federated_averaging_and_what_moved_most_becomes_personal(base):
    method, records = made("fedselect", steps=1, rounds=1, share=0.1), [RECORDS[:3], RECORDS[3:]]
    names = [target.name for target in targets(base)]
    both = copy.deepcopy(base.model)
    for turn in range(2):
        trained = [alone(base, both, names, some, 2 * turn + 1) for some in records]
        if turn == 0:
            masks, _ = method.play(context(base), names, records)
            for mask, model in zip(masks, trained, strict=True):
                for name in names:
                    moved = (model.get_parameter(name) - base.model.get_parameter(name)).detach().abs().view(-1)
                    most = moved.argsort(descending=True, stable=True)[: int(0.1 * len(moved))]
                    assert torch.equal(mask[name].view(-1).nonzero().squeeze(-1), most.sort().values)
        with torch.no_grad():
            for name in names:
                both.get_parameter(name).copy_(sum(model.get_parameter(name) for model in trained) / 2)
    _, found = method.model_copy(update={"share": 0.0, "rounds": 2}).play(context(base), names, records)
    for model in found:
        assert all(torch.allclose(model.get_parameter(name), both.get_parameter(name), atol=1e-6) for name in names)


def test_with_everything_personal_each_client_trains_alone(base):
    method, records = made("fedselect", steps=1, rounds=1, share=1.0, bound=1.0), [RECORDS[:3], RECORDS[3:]]
    names = [target.name for target in targets(base)]
    masks, before = method.play(context(base), names, records)
    assert all(mask[name].all() for mask in masks for name in names)
    _, found = method.model_copy(update={"rounds": 2}).play(context(base), names, records)
    for model, start, some in zip(found, before, records, strict=True):
        expected = alone(base, start, names, some, 2)
        assert all(torch.equal(model.get_parameter(name), expected.get_parameter(name)) for name in names)
        assert not torch.equal(model.get_parameter(names[0]), start.get_parameter(names[0]))
