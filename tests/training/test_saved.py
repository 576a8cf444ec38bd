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


@pytest.mark.parametrize("kinds", [["o_proj"], ["down_proj"], ["gate_proj", "up_proj"], ["q_proj", "k_proj", "v_proj"]])
def test_a_frozen_layer_keeps_no_input(kinds, base, rows):
    """The attention's output is kept for what trains behind it alone; the inputs of other layers (of norms, of the gated unit) are computed again."""
    everything = found(base, rows, lambda name: "embed" not in name).total()
    left = found(base, rows, lambda name: not any(kind in name for kind in [*kinds, "embed"])).total()
    assert left < everything if kinds == ["o_proj"] else left == everything


def test_one_trained_matrix_keeps_its_input_once_and_nothing_else(base, rows):
    last = base.model.config.num_hidden_layers - 1
    kept = found(base, rows, lambda name: f"layers.{last}.mlp.down_proj.weight" in name)
    assert set(by_kind(kept)) == {"down_proj", "norm"}  # the last norm is on the way back
    (size,) = [size for name, size in kept.items() if name.endswith(f"layers.{last}.mlp.down_proj")]
    assert size == len(rows[0]["input_ids"]) * base.model.config.intermediate_size * 4


def test_frozen_blocks_below_keep_nothing(base, rows):
    kept = found(base, rows, lambda name: "layers.1." in name)
    assert not [name for name in kept if "layers.0." in name]
    assert kept.total() > 0


def test_kinds_are_named_by_their_layer(base, rows):
    kinds = by_kind(found(base, rows, lambda name: "embed" not in name))
    assert sum(kinds.values()) == found(base, rows, lambda name: "embed" not in name).total()
    assert list(kinds.values()) == sorted(kinds.values(), reverse=True)
    assert not any(part.isdigit() for kind in kinds for part in kind.split("."))
