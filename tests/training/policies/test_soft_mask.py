"""Importance is a gradient of the disagreement of two dropout passes, and scales whole rows."""

import pytest
import torch

from selectune.errors import UserError
from selectune.models import Anatomy
from selectune.training.partial import train_entries
from selectune.training.policies import soft_mask
from selectune.training.policies.dropout import branches
from tests.tiny import tiny
from tests.training.policies.running import blocks, mixed, run, same
from tests.training.policies.staged import batch, make, stage


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_importance_is_the_slope_of_the_disagreement(architecture):
    one = stage(tiny(architecture))
    drop, inputs = branches(one.whole.causal), batch()

    def value(change=None):
        with soft_mask.masks(one, heads=True) as ones:
            if change is not None:
                name, place, by = change
                with torch.no_grad():
                    ones[name][place] += by
            return soft_mask.disagreement(one, inputs, drop, 0.3), ones

    total, ones = value()
    slopes = dict(zip(ones, torch.autograd.grad(total, list(ones.values())), strict=True))
    kinds = {name.rpartition(".")[2] if "/" not in name else "heads": name for name in ones}
    assert len(kinds) == 3
    for name in kinds.values():
        place = int(slopes[name].abs().argmax())
        up, down = (float(value((name, place, by))[0].detach()) for by in (0.02, -0.02))
        assert (up - down) / 0.04 == pytest.approx(float(slopes[name][place]), rel=0.05), name


def test_padding_has_no_say():
    one, inputs = stage(), batch()
    inputs["labels"][:, 14:] = -100
    inputs["position_ids"][:, 14:] = torch.arange(6)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, 14:] = 7
    drop = branches(one.whole.causal)
    found = [soft_mask.disagreement(one, given, drop, 0.3) for given in (inputs, other)]
    assert torch.equal(*found) and bool(found[0] > 0)


def test_without_dropout_nothing_matters_and_alike_is_zero():
    one = stage()
    assert all(not value.any() for value in make("soft_mask:dropout=0,heads=true").measure(one).values())
    raw = torch.tensor([1.0, -2.0, 4.0])
    expected = torch.tanh((raw - 1) / torch.tensor(3.0)).abs()
    assert torch.allclose(soft_mask.normalised(raw), expected)


def test_factors_lie_along_the_rows_of_weights_and_parts():
    model = tiny("llama")
    selection = mixed(model)
    train_entries(model, selection)
    one = stage(model, everything=False)
    policy = make("soft_mask:heads=true,dropout=0.1")
    policy.before_step(one)
    factors = policy.factors(one)
    up, query, last = (
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
    )
    assert set(factors) >= {up, query, last, "model.layers.3.self_attn.k_proj.weight"}
    for place, row in enumerate([1, 5, 9, 77]):
        assert torch.equal(factors[up][place], (1 - one.tensors[up][row]).expand(64))
    rows_of = selection.parts[query].index // 64
    assert torch.equal(factors[query], 1 - one.tensors[query][rows_of])
    assert torch.equal(factors[last], (1 - one.tensors[last])[:, None].expand(64, 128))
    heads = one.tensors["model.layers.3.self_attn.q_proj.weight"].view(4, 16)
    keys = one.tensors["model.layers.3.self_attn.k_proj.weight"].view(2, 16)
    assert torch.equal(heads[:, :1].expand(4, 16), heads)
    assert torch.equal(keys[:, 0], heads[:, 0].view(2, 2).amax(1))
    assert Anatomy.of(model).blocks[3].heads == 4


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_the_heads_of_a_fused_matrix_are_scaled_where_they_lie(architecture):
    one = stage(tiny(architecture))
    policy = make("soft_mask:heads=true,dropout=0.1,examples=1")
    policy.before_step(one)
    block = one.anatomy.blocks[0]
    (name,) = (f"{module}.weight" for module, role in block.linears.items() if role == "query_key_value")
    rows = one.tensors[name]
    heads = rows[: block.heads * 16 : 16]
    keys = heads.view(block.key_value_heads, -1).amax(1)
    assert heads.any() and torch.equal(rows, torch.cat([heads, keys, keys]).repeat_interleave(16))
    factor = policy.factors(one)[name]
    assert torch.equal(factor.t() if architecture == "gpt2" else factor, (1 - rows)[:, None].expand(-1, 64))


@pytest.mark.parametrize("mask", ["update", "gradient"])
def test_full_importance_leaves_rows_as_they_are(mask, tmp_path, llama_folder, monkeypatch):
    monkeypatch.setattr(soft_mask, "normalised", torch.ones_like)
    policy = {"method": "soft_mask", "mask": mask, "heads": True, "examples": 1}
    ran = run(tmp_path, llama_folder, policy, optimiser="sgd", rate=1.0, weight_decay=0.0)
    changed = {name for name in ran.after if not torch.equal(ran.after[name], ran.base[name])}
    assert changed and not any(
        role in name for name in changed for role in ("up_proj", "down_proj", "q_proj", "k_proj", "v_proj")
    )


def test_a_mask_makes_a_difference(tmp_path, llama_folder):
    plain = run(tmp_path / "a", llama_folder)
    assert not same(plain.after, run(tmp_path / "b", llama_folder, "soft_mask:dropout=0.1,examples=4").after)


def test_adapters_are_refused_in_one_line(tmp_path, llama_folder):
    with pytest.raises(UserError, match="form: full"):
        run(tmp_path, llama_folder, "soft_mask", choose=blocks, form="lora:rank=4")
