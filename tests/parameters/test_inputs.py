"""Scores of layers' inputs and of a domain's change against obvious re-computations."""

import math

import numpy as np
import pytest
import torch

from selectune import catalogue
from selectune.data import Encoder
from selectune.errors import UserError
from selectune.models import load_base
from selectune.parameters.factors.gradients import first, gather
from selectune.parameters.factors.inputs import input_moments, rounded, surgeon
from selectune.parameters.factors.scores import Settings, find
from selectune.parameters.factors.shift import Disturbed, robust
from selectune.parameters.factors.targets import targets
from tests.contracts.test_parameters import RECORDS, chosen, context
from tests.tiny import ARCHITECTURES


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_moments_are_those_of_the_inputs_token_by_token(architecture, tiny_folders):
    base = load_base(tiny_folders[architecture], dtype=torch.float32)
    eligible = targets(base)[:7]
    diagonal = input_moments(context(base), eligible, RECORDS[:2])
    whole = input_moments(context(base), eligible, RECORDS[:2], whole=True)
    for target in eligible:
        kept, module = [], base.model.get_submodule(target.name.removesuffix(".weight"))
        handle = module.register_forward_pre_hook(lambda module, inputs, kept=kept: kept.append(inputs[0][0].detach()))
        for record in RECORDS[:2]:
            (piece,) = Encoder(base.tokenizer, 128).encode(record)
            base.model(input_ids=torch.tensor([piece.input_ids]), use_cache=False)
        handle.remove()
        expected = sum(torch.outer(x, x) for x in torch.cat(kept)) * 2 / 2
        assert torch.allclose(whole[target.name], expected, rtol=1e-3, atol=1e-3 * float(expected.diagonal().mean()))
        assert torch.allclose(diagonal[target.name], whole[target.name].diagonal(), rtol=1e-4)


def test_rounding_keeps_each_rows_ends_and_has_so_many_levels():
    torch.manual_seed(0)
    weight = torch.randn(5, 200)
    for bits in (2, 4):
        found = rounded(weight, bits)
        assert all(len(row.unique()) <= 2**bits for row in found)
        step = (weight.amax(1) - weight.amin(1)) / (2**bits - 1)
        assert ((found - weight).abs() <= 1.001 * step[:, None]).all()  # the ends move by the rounding of zero
        assert (found - weight).abs().mean() < 0.3 * step.mean()
    assert torch.equal(rounded(torch.zeros(2, 3), 4), torch.zeros(2, 3))


def test_the_surgeons_importance_is_that_of_a_dense_reference():
    torch.manual_seed(0)
    weight, states = torch.randn(6, 20), torch.randn(50, 20)
    moment = 2 * states.T @ states
    steady = moment.numpy().astype(np.float64) + 0.01 * moment.diagonal().mean().item() * np.eye(20)
    upper = np.linalg.cholesky(np.linalg.inv(steady)).T
    expected = weight.numpy() ** 2 / np.diag(upper) ** 2
    for sparsity in (0.0, 0.5):  # one block: nothing was made good before it
        assert np.allclose(surgeon(weight, moment, sparsity), expected, rtol=1e-3)
    two = surgeon(weight, moment, 0.5, width=10)
    assert np.allclose(two[:, :10], expected[:, :10], rtol=1e-3) and not np.allclose(two[:, 10:], expected[:, 10:], rtol=1e-2)
    repaired = weight.double().numpy().copy()  # the second block by hand: remove, make good, one column after the other
    gone = two[:, :10] <= two[:, :10].reshape(-1).kthvalue(30).values
    for column in range(10):
        for row in range(6):
            if gone[row, column]:
                repaired[row, column:] -= repaired[row, column] / upper[column, column] * upper[column, column:]
    assert np.allclose(two[:, 10:], repaired[:, 10:] ** 2 / np.diag(upper)[10:] ** 2, rtol=1e-3)


def test_weights_of_a_dead_input_matter_to_nothing_and_do_not_break_the_surgeon():
    states = torch.randn(30, 8)
    states[:, 3] = 0
    found = surgeon(torch.randn(4, 8), states.T @ states)
    assert found.isfinite().all() and not found[:, 3].any()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rounding_error_and_dual_importance_by_their_formulas(architecture, tiny_folders):
    base = load_base(tiny_folders[architecture], dtype=torch.float32)
    made = context(base)
    eligible, names = targets(base), [target.name for target in targets(base)]
    general = first(made.general, 2)
    whole = input_moments(made, eligible, general, whole=True)
    errors = find("rounding_error")(context(base), eligible, Settings(examples=2))
    dual = find("dual_importance")(context(base), eligible, Settings(examples=2, penalty=0.5, step=0.2))
    domain = gather(made, names, ["mean", "squared"], examples=2)
    for target in eligible:
        weight = base.model.get_parameter(target.name).detach().float()
        matrix = weight.T if target.transposed else weight
        by_hand = whole[target.name].diagonal() * (matrix - rounded(matrix, 4)) ** 2
        assert torch.allclose(errors[target.name], by_hand.T if target.transposed else by_hand, rtol=1e-3, atol=1e-6)
        importance = surgeon(matrix, whole[target.name])
        importance = importance.T if target.transposed else importance
        g = domain["mean"][target.name]
        u = (g + 2 * 0.5 * 0.2**2 * importance * g**2) * weight
        expected = (u + 0.5 * domain["squared"][target.name] * weight**2).abs()
        assert torch.allclose(dual[target.name], expected, rtol=1e-3, atol=1e-8), target.name


def test_without_the_penalty_general_text_does_not_matter(llama_folder):
    base = load_base(llama_folder)
    eligible = targets(base)
    plain = find("dual_importance")(context(base), eligible, Settings(examples=2, penalty=0))
    domain = gather(context(base), [target.name for target in eligible], ["mean", "squared"], examples=2)
    for target in eligible:
        weight = base.model.get_parameter(target.name).float()
        expected = (domain["mean"][target.name] * weight + domain["squared"][target.name] * weight**2 / 2).abs()
        assert torch.allclose(plain[target.name], expected, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("score", ["rounding_error", "dual_importance", "domain_robust_fisher"])
def test_every_architecture_has_them(score, architecture, tiny_folders):
    base = load_base(tiny_folders[architecture])
    found = find(score)(context(base), targets(base, "attention"), Settings(examples=2))
    assert found and all(value.isfinite().all() and value.any() for value in found.values())


@pytest.mark.parametrize("name", ["scored", "lift", "neuroada", "fishertune", "d_pruner"])
@pytest.mark.parametrize("score", ["rounding_error", "dual_importance"])
def test_stacks_of_experts_are_refused_in_one_line_and_the_attention_beside_them_is_scored(score, name, tiny_folders):
    base, settings = load_base(tiny_folders["mixtral"]), {"method": name, "score": score, "examples": 1}
    with pytest.raises(UserError, match="stacks of experts have no inputs"):
        catalogue.create("parameters", settings).select(context(base))
    method = catalogue.create("parameters", {**settings, "targets": "attention"})
    assert 0 < method.select(context(base)).count() <= sum(target.count for target in targets(base, "attention"))


def test_without_a_change_of_domain_the_score_is_the_fisher_score(llama_folder):
    base = load_base(llama_folder)
    eligible = targets(base)
    plain = find("fisher")(context(base), eligible, Settings(examples=2))
    same = find("domain_robust_fisher")(context(base), eligible, Settings(examples=2, shift=0.0))
    other = find("domain_robust_fisher")(context(base), eligible, Settings(examples=2, shift=0.5))
    assert all(torch.equal(same[name], plain[name]) for name in plain)
    assert all((other[name] >= plain[name]).all() and not torch.equal(other[name], plain[name]) for name in plain)


def test_the_robust_score_by_hand():
    plain = torch.arange(1.0, 11.0).view(2, 5)
    other = plain.flip(1)
    change = [[abs(a - b) / (min(a, b) + 1.0) for a, b in zip(p, o)] for p, o in zip(plain.tolist(), other.tolist())]
    size = 5.5 / (sum(map(sum, change)) / 10)
    expected = torch.tensor([[a + math.exp(-0.2) * size * c for a, c in zip(p, r)] for p, r in zip(plain.tolist(), change)])
    assert torch.allclose(robust(plain, other, 0.2), expected)


def test_only_prompts_are_disturbed_and_by_so_much(llama_folder):
    base = load_base(llama_folder)
    row = {"input_ids": torch.arange(400), "labels": torch.where(torch.arange(400) < 300, -100, torch.arange(400))}
    changed = Disturbed(context(base), 0.25, 2)(row)["input_ids"] != row["input_ids"]
    assert not changed[300:].any() and 0.15 < float(changed[:300].float().mean()) < 0.3


def test_fishertunes_choice_grows_with_time_and_is_the_normalised_scores_above_the_threshold(llama_folder):
    base = load_base(llama_folder)
    scores = find("domain_robust_fisher")(context(base), targets(base), Settings(examples=2))
    before = None
    for time in (0.0, 1.0, 5.0):
        method = catalogue.create("parameters", {"method": "fishertune", "time": time, "examples": 2})
        assert method.threshold() == pytest.approx(0.1 + 0.8 * math.exp(-time))
        found = method.select(context(base))
        for name, value in scores.items():
            assert torch.equal(found.mask(name), value / value.max() > method.threshold())
        assert before is None or ((before - found).count() == 0 and found.count() > before.count())
        before = found
    every = catalogue.create("parameters", "fishertune:highest=0,lowest=0,examples=2").select(context(base))
    assert every.count() == sum(int((value > 0).sum()) for value in scores.values())


def test_weak_columns_are_the_most_sensitive_to_rounding(tiny_folders):
    for architecture in ("llama", "gpt2"):
        base = load_base(tiny_folders[architecture])
        found = chosen("weak_columns", base, k=3)
        errors = find("rounding_error")(context(base), targets(base), Settings(examples=2))
        for target in targets(base):
            matrix = errors[target.name].T if target.transposed else errors[target.name]
            expected = sorted(sorted(range(matrix.shape[1]), key=lambda j: -float(matrix[:, j].sum()))[:3])
            part = found.parts[target.name]
            assert part.form == ("rows" if target.transposed else "columns") and part.index.tolist() == expected
    with pytest.raises(UserError, match="k"):
        chosen_raw = catalogue.create("parameters", "weak_columns:k=65,examples=1")
        chosen_raw.select(context(load_base(tiny_folders["llama"])))


def test_entries_without_any_fisher_do_not_drown_the_others():
    plain = torch.cat([torch.zeros(10), torch.ones(10)])
    other = torch.cat([torch.full((5,), 5.0), torch.zeros(5), torch.full((10,), 3.0)])
    found = robust(plain, other, 0.2)
    assert found.isfinite().all() and (found[10:] > 1).all() and (found[5:10] == 0).all()
    assert robust(torch.zeros(4), torch.zeros(4), 0.2).tolist() == [0] * 4
