"""Choices by role are exactly the named tensors, of fused matrices exactly the rows."""

import re

import pytest
import torch

from selectune import catalogue
from selectune.errors import UserError
from selectune.models import load_base
from selectune.models.anatomy import Anatomy
from selectune.parameters import Selection
from selectune.parameters.factors.roles import weights_by_role
from selectune.parameters.factors.targets import targets
from selectune.parameters.factors.units import unit_slices
from selectune.training.partial import train_entries
from selectune.training.prefix import frozen_blocks
from tests.contracts.test_parameters import context
from tests.tiny import save_tiny, tiny


def choose(name, base, **values):
    """Choose with a method of the catalogue."""
    return catalogue.create("parameters", {"method": name, **values}).select(context(base))


def matching(base, pattern):
    return sorted(name for name, _ in base.model.named_parameters() if re.search(pattern, name))


@pytest.mark.parametrize(
    ("method", "architecture", "pattern"),
    [
        ({"name": "attention_only"}, "llama", r"[qkvo]_proj\.weight"),
        ({"name": "attention_only"}, "qwen2", r"([qkvo]_proj\.weight|[qkv]_proj\.bias)"),
        ({"name": "attention_only"}, "gpt2", r"(attn\.c_|wpe)"),
        ({"name": "attention_only", "positions": False}, "gpt2", r"attn\.c_"),
        ({"name": "attention_only", "variant": "mlp"}, "llama", r"(gate|up|down)_proj"),
        ({"name": "attention_projections"}, "gemma2", r"[qkvo]_proj"),
        ({"name": "attention_projections", "output": False}, "llama", r"[qkv]_proj"),
        ({"name": "gate_up"}, "llama", r"(gate|up)_proj"),
        ({"name": "gate_up"}, "mixtral", r"gate_up_proj"),
        ({"name": "gate_up", "down": True}, "llama", r"(gate|up|down)_proj"),
        ({"name": "norms"}, "llama", r"norm"),
        ({"name": "norms", "final": False}, "llama", r"layers.*norm"),
        ({"name": "biases"}, "gpt2", r"bias"),
        ({"name": "biases", "roles": "attention_output+down"}, "gpt2", r"c_proj\.bias"),
        ({"name": "biases"}, "qwen2", r"[qkv]_proj\.bias"),
        ({"name": "roles", "roles": "value+down", "first": 1, "last": 2}, "llama", r"layers\.[12]\..*(v|down)_proj"),
        ({"name": "personalised", "subset": "embeddings_and_head"}, "llama", r"embed"),
        ({"name": "personalised", "subset": "embeddings_and_head"}, "gemma2", r"(embed|lm_head)"),
        ({"name": "personalised", "subset": "all"}, "llama", r""),
        ({"name": "personalised"}, "llama", r"layers\.3\."),
    ],
)
def test_exactly_the_named_tensors_are_chosen_whole(method, architecture, pattern, tiny_folders):
    base = load_base(tiny_folders[architecture])
    chosen = choose(base=base, **method)
    assert chosen == Selection.of(base.model, matching(base, pattern))


def test_of_a_fused_matrix_only_the_rows_of_the_role_are_chosen(tiny_folders, tmp_path):
    base = load_base(tiny_folders["gpt2"])
    keys = weights_by_role(base, "key")  # inputs by outputs: query, key, value side by side, 64 each
    expected = torch.zeros(64, 192, dtype=torch.bool)
    expected[:, 64:128] = True
    assert keys.names() == matching(base, r"attn\.c_attn")
    assert all(torch.equal(keys.mask(name), expected if name.endswith("weight") else expected[0]) for name in keys.names())
    base = load_base(save_tiny("phi3", tmp_path))
    ups = weights_by_role(base, "up+value", blocks=[2])
    assert ups.names() == ["model.layers.2.mlp.gate_up_proj.weight", "model.layers.2.self_attn.qkv_proj.weight"]
    gate_up, query_key_value = (ups.mask(name) for name in ups.names())
    assert gate_up[128:].all() and not gate_up[:128].any()
    assert query_key_value[96:].all() and not query_key_value[:96].any() and len(query_key_value) == 128
    base = load_base(tiny_folders["mixtral"])
    gates = weights_by_role(base, "gate", blocks=[0])
    (name,) = gates.names()
    assert gates.mask(name)[:, :128].all() and not gates.mask(name)[:, 128:].any()


def test_gradients_are_those_of_full_tuning(llama_folder):
    found = []
    for name in ("attention_only", "all"):
        base = load_base(llama_folder)
        trained = train_entries(base.model, choose(name, base))
        base.model(input_ids=torch.arange(3, 30)[None]).logits.square().mean().backward()
        found.append({key: value.grad for key, value in trained.items()})
    assert len(found[0]) == 16 and all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_below_the_last_block_nothing_is_computed_backward(llama_folder):
    base = load_base(llama_folder)
    train_entries(base.model, choose("personalised", base))
    needs = []
    for block in base.model.model.layers:
        block.register_forward_pre_hook(lambda module, inputs: needs.append(inputs[0].requires_grad))
    base.model(input_ids=torch.arange(3, 30)[None])
    assert needs == [False] * 4


@pytest.mark.parametrize(("architecture", "small"), [("llama", "auto"), ("qwen2", "norm")])
def test_without_lower_strata_spafit_is_all_attention_matrices_and_all_norms(architecture, small, tiny_folders):
    base = load_base(tiny_folders[architecture])
    norms = [name for block in base.anatomy.blocks for name in block.norms]
    expected = weights_by_role(base, "attention", biases=False) | Selection.of(base.model, norms)
    assert choose("spafit", base, n1=0, n2=0, roles="attention", small=small) == expected and len(expected.parts) == 4 * (4 + 2)


def test_below_the_first_cut_of_spafit_nothing_is_computed_backward(llama_folder):
    base = load_base(llama_folder)
    ids = torch.arange(3, 30)[None]
    model = catalogue.create("adapters", "sparse_and_low_rank").apply(base, choose("spafit", base, n1=1), 0)
    assert frozen_blocks(model)[1] == 1
    needs = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda module, inputs: needs.append(inputs[0].requires_grad))
    logits = model(input_ids=ids).logits
    assert needs == [False, False, True, True]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)


def test_what_is_not_there_is_refused_in_one_line(llama_folder):
    base = load_base(llama_folder)
    for name, values, words in (
        ("biases", {}, "no such biases"),
        ("roles", {"first": 2, "last": 4}, "the base has 4"),
        ("roles", {"roles": "valeu"}, "did you mean 'value'"),
        ("personalised", {"k": 5}, "the base has 4"),
    ):
        with pytest.raises(UserError, match=words):
            choose(name, base, **values)


def test_a_norm_inside_attention_is_a_norm(tmp_path):
    model = tiny("qwen3")
    base = load_base(save_tiny("qwen3", tmp_path))
    assert "model.layers.0.self_attn.q_norm.weight" in Anatomy.of(model).blocks[0].norms
    assert not any("norm" in name for name in choose("attention_only", base).names())
    assert "model.layers.0.self_attn.q_norm.weight" in choose("norms", base).names()


def test_mixed_rows_of_a_fused_matrix_are_refused_and_its_other_matrices_are_known(tmp_path):
    """GPT-NeoX: of each head its query, key and value, one after the other."""
    from types import SimpleNamespace

    from transformers import AutoConfig, AutoModelForCausalLM

    from selectune.models import Anatomy

    config = AutoConfig.for_model(
        "gpt_neox", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    model = AutoModelForCausalLM.from_config(config)
    base = SimpleNamespace(model=model, anatomy=Anatomy.of(model))
    assert {target.role for target in targets(base, "linear")} == {"query_key_value", "attention_output", "up", "down"}
    assert weights_by_role(base, "attention", biases=False).count() == 2 * (3 * 32 * 32 + 32 * 32)
    with pytest.raises(UserError, match="laid out in a way of their own"):
        weights_by_role(base, "value")
    with pytest.raises(UserError, match="laid out in a way of their own"):
        unit_slices("head", base.anatomy.blocks[0], targets(base, "attention"))
