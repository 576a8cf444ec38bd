"""SNELLA: the faithful-if lines of the card."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch

from selectune import catalogue
from selectune.adapters.attached import attachments
from selectune.adapters.snella import KernelChange, kernel
from selectune.errors import UserError
from selectune.models import load_base
from selectune.parameters import Selection
from selectune.parameters.factors.allocation import apportion
from selectune.parameters.selection import Part
from selectune.training.policies.snella import SNELLACompetition
from tests.contracts.test_forms_and_parameters import logits
from tests.training.policies.running import blocks, run, same


def change(sparsity=0.7):
    torch.manual_seed(0)
    one = KernelChange(24, 16, 4, sparsity, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for value in one.parameters():
            value += 0.3 * torch.randn_like(value)
    return one


@torch.no_grad()
def test_the_kernel_is_its_formula_and_of_higher_rank_than_its_factors():
    one = change()
    found = kernel(one.rows, one.columns, one.mix)
    distance = [[[(one.rows[h, i] - one.columns[h, j]).norm() for j in range(16)] for i in range(24)] for h in range(2)]
    difference = 0.1 * (torch.tensor(distance[0]) - torch.tensor(distance[1]))
    by_hand = difference + one.mix[0] * (difference / one.mix[1]).softmax(-1) + one.mix[2]
    assert torch.allclose(found, by_hand, atol=1e-5)
    assert torch.linalg.matrix_rank(found) > 4 >= torch.linalg.matrix_rank(one.rows[0] @ one.columns[0].T)


@torch.no_grad()
def test_the_largest_kernel_values_change_and_nothing_else():
    for sparsity in (0.0, 0.25, 0.7, 0.99):
        one = change(sparsity)
        found = one.change()
        values = kernel(one.rows, one.columns, one.mix)
        first = kernel(one.first_rows, one.first_columns, one.first_mix)
        count = 24 * 16 - int(sparsity * 24 * 16)
        limit = values.abs().view(-1).sort(descending=True).values[count - 1]
        expected = (values * values.abs() - first * first.abs()) * (values.abs() >= limit)
        assert torch.allclose(found, expected, atol=1e-6)
        assert (found == 0).sum() == 24 * 16 - count


def test_the_change_is_of_fp32_where_products_are_of_bf16():
    one = change()
    with torch.autocast("cpu", torch.bfloat16):
        found = one.change()
    assert found.dtype == torch.float32 and torch.equal(found, one.change())


def test_gradients_reach_the_factors_at_the_start_and_where_two_vectors_meet():
    one = KernelChange(6, 5, 4, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(one.change(), torch.zeros(6, 5))
    with torch.no_grad():
        one.rows[0, 0] = one.columns[0, 0]
    (one.change() * torch.randn(6, 5)).sum().backward()
    for value in one.parameters():
        assert value.grad.isfinite().all() and value.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_is_attached(architecture, tiny_folders):
    base = load_base(tiny_folders[architecture])
    model = catalogue.create("adapters", "snella:rank=4").apply(base, Selection.all(base.model), 0)
    torch.manual_seed(0)
    for one in attachments(model).values():
        one.rows += 0.3 * torch.randn_like(one.rows)
    attached = logits(model)
    assert not torch.allclose(attached, logits(load_base(tiny_folders[architecture]).model), atol=1e-2)
    assert torch.allclose(logits(copy.deepcopy(model).merge_and_unload()), attached, atol=1e-3)


def test_the_competition_is_its_formula_and_the_more_sensitive_have_more():
    matrices = {name: KernelChange(6, 5, 4, 0.5, torch.Generator().manual_seed(seed)) for seed, name in enumerate("abc")}
    stage = SimpleNamespace(passing={"matrices": matrices}, tensors={}, step=8, steps=10)
    policy, draw = SNELLACompetition(sparsity=0.5), torch.Generator().manual_seed(0)
    smoothed, varied = {}, {}
    for _ in range(3):
        for size, (name, one) in enumerate(matrices.items(), 1):
            for key, value in (("rows", one.rows), ("columns", one.columns)):
                value.grad = size**2 * torch.randn(value.shape, generator=draw)
                now = (value * value.grad).abs().detach()
                smoothed[name, key] = 0.85 * smoothed.get((name, key), 0) + 0.15 * now
                varied[name, key] = 0.85 * varied.get((name, key), 0) + 0.15 * (now - smoothed[name, key]).abs()
        policy.gradients(stage)
    policy.after_step(stage)
    scores = [sum(float((smoothed[name, key] * varied[name, key]).mean()) for key in ("rows", "columns")) for name in matrices]
    counts = [int(one.nonzeros) for one in matrices.values()]
    assert counts == apportion(45, scores, [30] * 3) == sorted(counts) and counts[-1] == 30 and scores == sorted(scores)


def test_matrices_share_the_budget_by_their_sensitivity_and_resume(tmp_path, llama_folder):
    settings = {"choose": blocks, "form": "snella:rank=4", "steps": 6, "keep_best": True}
    made = run(tmp_path / "whole", llama_folder, {"method": "snella", "sparsity": 0.5}, **settings)
    matrices = attachments(made.model)
    counts = {name: int(one.nonzeros) for name, one in matrices.items()}
    sizes = {name: one.rows.shape[1] * one.columns.shape[1] for name, one in matrices.items()}
    assert sum(counts.values()) == round(0.5 * sum(sizes.values())) and made.result.best_step is None
    assert all(count <= sizes[name] for name, count in counts.items())
    assert len({counts[name] / sizes[name] for name in counts}) > 3
    for one in matrices.values():
        assert int((one.change() != 0).sum()) == int(one.nonzeros)
    shutil.copytree(tmp_path / "whole/checkpoints/checkpoint-3", tmp_path / "cut/checkpoints/checkpoint-3")
    again = run(tmp_path / "cut", llama_folder, {"method": "snella", "sparsity": 0.5}, **settings)
    assert same(again.after, made.after)
    with pytest.raises(UserError, match="form 'snella'"):
        run(tmp_path / "full", llama_folder, "snella")


def test_the_last_step_reaches_the_sparsity_and_chosen_entries_are_refused(tmp_path, llama_folder):
    made = run(
        tmp_path, llama_folder, {"method": "snella", "sparsity": 0.5, "every": 100}, choose=blocks, form="snella:rank=4", steps=3
    )
    matrices = attachments(made.model).values()
    whole = sum(one.rows.shape[1] * one.columns.shape[1] for one in matrices)
    assert sum(int(one.nonzeros) for one in matrices) == round(0.5 * whole)
    base = load_base(llama_folder)
    part = Selection({"model.layers.1.mlp.up_proj.weight": Part((128, 64), "rows", [1, 5])})
    with pytest.raises(UserError, match="parts of them were chosen"):
        catalogue.create("adapters", "snella").apply(base, part, 0)
