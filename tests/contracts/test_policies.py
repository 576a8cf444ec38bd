"""The contract of every policy: the same again with the same seed, nothing changes that was not chosen (under AdamW with decay, clipping,
accumulation and bf16), and a run that was killed resumes to the same bytes."""

import shutil

import pytest
import torch

from selectune import catalogue
from selectune.errors import UserError
from selectune.models import Anatomy
from selectune.parameters import Selection
from tests.training.policies.running import blocks, dense, run, same

SETTINGS: dict[str, dict] = {
    "roast": {"examples": 3, "every": 2},
    "soft_mask": {"examples": 3, "dropout": 0.1},
    "layer_sampling": {"blocks": 1, "every": 2, "by": "gradient_norm", "examples": 2},
    "importance_sampling": {"every": 2, "examples": 2, "active": 0.5, "strength": 0.0},
    "half": {"every": 2},
    "refresh": {"parameters": "lift:rank=4", "every": 2},
    "zeroth_order": {"sparsity": 0.5},
    "private": {"noise": 0.5},
    "routed": {"parameters": "language_neurons:k=2,examples=3"},
    "bursts": {"every": 2, "steps": 2, "buffer": 4, "share": 0.2},
    "sparse_lora": {"dense_blocks": 0.0},
}
"""What a policy needs to be tried in six steps."""
NEUTRAL: dict[str, dict] = {
    "gradient_mask": {"keep": 1.0},
    "bi_drop": {"dropout": 0.0},
    "roast": {"epsilon": 0.0, "masked": False},
    "soft_mask": {"dropout": 0.0},
    "layer_sampling": {"blocks": 9},
    "importance_sampling": {"active": 1.0},
    "half": {"share": 1.0},
    "refresh": {"every": 7},
    "sharpness": {"radius": 0.0},
    "breadth_first": {"enough": 0.0},
    "bursts": {"steps": 0},
    "replay": {},
    "uds": {"keep": 1.0},
    "routed": {"parameters": "language_neurons:general=1.0,examples=2"},
}
"""Settings with which a policy is plain training."""
ON_ADAPTERS = {"roselora": "lora", "fslora": "lora", "snella": "snella", "sparse_lora": "lora", "first": "first"}
"""Policies that act on adapters of a form alone; the rest of their contract is in test_low_rank.py, tests/adapters/test_snella.py, ..."""
REFUSED = {
    ("sparsegrad", "mixtral"),
    ("sparse_lora", "mixtral"),
    ("sparse_lora", "gpt2"),
    ("routed", "mixtral"),
    ("soft_mask", "mixtral"),
}
"""Policies that have nothing to act on in an architecture."""
POLICIES = [name for name in catalogue.methods("policies") if name not in {"none", *ON_ADAPTERS}]


def values(name, neutral=False):
    return {"method": name, **SETTINGS.get(name, {}), **(NEUTRAL[name] if neutral else {})}


@pytest.mark.parametrize("name", POLICIES)
def test_only_the_selection_changes_and_the_same_seed_gives_the_same(name, tmp_path, llama_folder):
    one = run(tmp_path / "a", llama_folder, values(name), bfloat16=True)
    selection = one.result.touched or one.selection
    changed = 0
    for key, value in one.after.items():
        if key in ("lm_head.weight",):
            continue
        free = selection.mask(key) if selection.covers(key) else torch.zeros(value.shape, dtype=torch.bool)
        assert torch.equal(value[~free].float(), one.base[key][~free].float()), key
        changed += int((value != one.base[key]).sum())
    assert changed
    two = run(tmp_path / "b", llama_folder, values(name), bfloat16=True)
    assert same(one.after, two.after)


@pytest.mark.parametrize(("evaluations", "step"), [(2, 3), (3, 4)])
@pytest.mark.parametrize("name", POLICIES)
def test_a_killed_run_resumes_to_the_same_bytes(name, evaluations, step, tmp_path, llama_folder):
    whole = run(tmp_path / "whole", llama_folder, values(name), evaluations=evaluations)
    kept = f"checkpoints/checkpoint-{step}"
    shutil.copytree(tmp_path / "whole" / kept, tmp_path / "cut" / kept)
    resumed = run(tmp_path / "cut", llama_folder, values(name), evaluations=evaluations)
    assert same(resumed.after, whole.after)
    assert resumed.result.touched == whole.result.touched


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_setting_is_plain_training(name, tmp_path, llama_folder):
    plain = run(tmp_path / "plain", llama_folder)
    assert same(run(tmp_path / "neutral", llama_folder, values(name, neutral=True)).after, plain.after)


@pytest.mark.parametrize("name", POLICIES)
def test_the_best_checkpoint_comes_back(name, tmp_path, llama_folder):
    made = run(tmp_path, llama_folder, values(name), keep_best=True, rate=1e-1)
    best = made.result.best_step
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-6") if best != 6 else None
    assert same(dense(made.model), made.after)
    assert best in (3, 6)


@pytest.mark.parametrize("name", [*POLICIES, *ON_ADAPTERS])
def test_activations_that_are_computed_again_are_the_same(name, tmp_path, llama_folder):
    on = {"choose": blocks, "form": ON_ADAPTERS[name]} if name in ON_ADAPTERS else {}
    kept = run(tmp_path / "kept", llama_folder, values(name), prefix_cache=False, **on)
    again = run(tmp_path / "again", llama_folder, values(name), gradient_checkpointing=True, **on)
    assert kept.after.keys() == again.after.keys()
    assert all(torch.allclose(value, again.after[key], atol=1e-4) for key, value in kept.after.items())


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("name", [*POLICIES, *ON_ADAPTERS])
def test_another_base_trains_or_is_refused_in_one_line(name, architecture, tmp_path, tiny_folders):
    def inside(model):
        return Selection.of(model, [weight for block in Anatomy.of(model).blocks for weight in block.parameters])

    try:
        made = run(tmp_path, tiny_folders[architecture], values(name), steps=3, choose=inside, form=ON_ADAPTERS.get(name, "full"))
    except UserError as error:
        assert (name, architecture) in REFUSED and "\n" not in str(error)
        return
    assert (name, architecture) not in REFUSED
    assert all(bool(value.isfinite().all()) for value in made.after.values()) and not same(made.after, made.begun)
