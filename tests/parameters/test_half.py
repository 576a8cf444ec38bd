"""Half fine-tuning draws the halves that it says, and a half reset undoes exactly the other half."""

import copy
import math

import pytest
import torch

from selectune import catalogue
from selectune.merging.delta import Delta
from selectune.merging.half_reset import half_reset
from selectune.models import load_base
from selectune.parameters import Selection
from selectune.parameters.half import draw, units_of
from tests.contracts.test_parameters import context
from tests.tiny import ARCHITECTURES, save_tiny


def choose(base, seed=0, **values):
    """Choose with half fine-tuning, and what it noted."""
    asked = context(base, seed)
    return catalogue.create("parameters", {"method": "half", **values}).select(asked), asked.notes


def ending(selection, block, *ends):
    return [name for name in selection.names() if f".layers.{block}." in name and any(f"{end}.weight" in name for end in ends)]


@pytest.mark.parametrize("blocks", [4, 5])
def test_of_every_block_two_attention_matrices_one_norm_and_one_or_two_of_the_mlp(blocks, tmp_path):
    base = load_base(save_tiny("llama", tmp_path, num_hidden_layers=blocks))
    for seed in range(5):
        chosen, _ = choose(base, seed)
        assert chosen.whole() and {"model.embed_tokens.weight", "model.norm.weight"} <= set(chosen.names())
        mlp = [len(ending(chosen, block, "gate_proj", "up_proj", "down_proj")) for block in range(blocks)]
        assert sorted(mlp)[: blocks // 2] == [1] * (blocks // 2) and sorted(mlp)[math.ceil(blocks / 2) :] == [2] * (blocks // 2)
        for block in range(blocks):
            assert len(ending(chosen, block, "q_proj", "k_proj", "v_proj", "o_proj")) == 2
            assert len(ending(chosen, block, "layernorm")) == 1


def test_draws_follow_seed_and_round(llama_folder):
    base = load_base(llama_folder)
    assert choose(base, 3)[0] == choose(base, 3)[0]
    rounds = [choose(base, 3, round=number)[0] for number in range(3)]
    assert rounds[0] != rounds[1] and rounds[1] != rounds[2] and rounds[1] == choose(base, 3, round=1)[0]
    assert rounds[0] != choose(base, 4)[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("level", ["category", "layer", "model"])
def test_a_ratio_of_one_is_full_fine_tuning(architecture, level, tiny_folders):
    base = load_base(tiny_folders[architecture])
    assert choose(base, ratio=1, level=level)[0] == Selection.all(base.model)
    inside = choose(base, level=level, train_embeddings=False)[0]
    assert not any(name in base.anatomy.embeddings or name == base.anatomy.head for name in inside.names())


def test_layers_and_models_are_halved(llama_folder):
    base = load_base(llama_folder)
    layers = choose(base, level="layer", train_embeddings=False)[0]
    whole = [all(layers.covers(name) for name in block.parameters) for block in base.anatomy.blocks]
    touched = [any(layers.covers(name) for name in block.parameters) for block in base.anatomy.blocks]
    assert whole == touched and sum(whole) == 2
    assert len(choose(base, level="model", train_embeddings=False)[0].names()) == 4 * 9 // 2 + 1


def test_a_balanced_draw_takes_half_of_the_entries_and_the_share_is_told(llama_folder):
    base = load_base(llama_folder)
    sizes = base.anatomy.sizes
    ends = ("q_proj", "k_proj", "v_proj", "o_proj")
    pairs = set()
    for seed in range(8):
        chosen, notes = choose(base, seed, balanced=True)
        for block in range(4):
            names = ending(chosen, block, *ends)
            pairs.add(tuple(name.split(".")[-2] for name in names))
            assert sum(sizes[name] for name in names) == 64 * 64 + 32 * 64
        inside = [name for block in base.anatomy.blocks for name in block.parameters]
        share = sum(sizes[name] for name in inside if chosen.covers(name)) / sum(sizes[name] for name in inside)
        assert notes == [f"{share:.1%} of the weights inside the blocks train."]
    assert pairs == {("k_proj", "o_proj"), ("k_proj", "q_proj"), ("o_proj", "v_proj"), ("q_proj", "v_proj")}
    fair = {len({sum(sizes[n] for n in ending(choose(base, seed)[0], 0, *ends))}) for seed in range(8)}
    assert fair == {1}


def test_units_are_every_parameter_of_a_block_once(tiny_folders):
    for architecture in ARCHITECTURES:
        base = load_base(tiny_folders[architecture])
        for block, units in zip(base.anatomy.blocks, units_of(base.anatomy), strict=True):
            names = [name for unit in units for name in unit.names]
            assert sorted(names) == sorted(block.parameters)
            assert sum(unit.entries for unit in units) == sum(base.anatomy.sizes[name] for name in names)


def test_a_reset_puts_a_half_back_and_leaves_the_rest_of_the_specialist(llama_folder):
    base = load_base(llama_folder)
    specialist = copy.deepcopy(base.model)
    with torch.no_grad():
        for value in specialist.parameters():
            value += 0.5
    delta = Delta.of(base, specialist)
    half = half_reset(delta, base, seed=1)
    reset = set(draw(base.anatomy, torch.Generator().manual_seed(1)))
    half.apply(base)
    for name, value in base.model.named_parameters():
        expected = load_base(llama_folder).model.get_parameter(name) if name in reset else specialist.get_parameter(name)
        assert torch.equal(value, expected), name
    assert len(reset) == len(delta.selection.parts) - len(half.selection.parts)
