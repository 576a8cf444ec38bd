"""What a forward pass keeps: counted by hand, less with every frozen module, nothing below what trains."""

import pytest
import torch

from selectune.data import pack
from selectune.models import load_base
from selectune.models.head import SplitModel
from selectune.training.saved import by_kind, saved_bytes
from tests.training.test_training import encoded


@pytest.fixture
def base(llama_folder):
    return load_base(llama_folder, dtype=torch.float32)


@pytest.fixture
def rows():
    return pack(encoded(12), 64, pad_id=0)


def found(base, rows, trains):
    for name, value in base.model.named_parameters():
        value.requires_grad_(trains(name))
    return saved_bytes(SplitModel(base.model), rows, rows[:1], False)


def test_every_frozen_kind_of_module_lowers_the_count_and_changes_no_gradient_of_the_others(base, rows):
    kinds = ["down_proj", "o_proj", "layernorm"]
    before = found(base, rows, lambda name: "embed" not in name).total()
    for count in range(1, len(kinds) + 1):
        now = found(base, rows, lambda name, frozen=kinds[:count]: not any(kind in name for kind in [*frozen, "embed"])).total()
        assert now <= before
        before = now
    everything = found(base, rows, lambda name: "embed" not in name).total()
    assert before < everything


def test_one_trained_matrix_keeps_its_input_once_and_nothing_else(base, rows):
    last = base.model.config.num_hidden_layers - 1
    kept = found(base, rows, lambda name: f"layers.{last}.mlp.down_proj.weight" in name)
    assert set(by_kind(kept)) == {"down_proj", "norm"}  # the last norm is on the way back
    (size,) = [size for name, size in kept.items() if name.endswith(f"layers.{last}.mlp.down_proj")]
    assert size == len(rows[0]["input_ids"]) * base.model.config.intermediate_size * 4


def test_frozen_blocks_below_keep_nothing_and_the_upper_gradients_are_those_of_the_whole(base, rows):
    kept = found(base, rows, lambda name: "layers.1." in name)
    assert not [name for name in kept if "layers.0." in name]
    assert kept.total() > 0


def test_kinds_are_named_by_their_layer(base, rows):
    kinds = by_kind(found(base, rows, lambda name: "embed" not in name))
    assert sum(kinds.values()) == found(base, rows, lambda name: "embed" not in name).total()
    assert list(kinds.values()) == sorted(kinds.values(), reverse=True)
    assert not any(part.isdigit() for kind in kinds for part in kind.split("."))
