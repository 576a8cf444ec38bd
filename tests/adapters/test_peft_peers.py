"""PEFT's sparse tuners under our selections, and the form that is sparse on some matrices and low-rank on others."""

import pytest
import torch

from selectune import catalogue
from selectune.adapters import load_specialist
from selectune.errors import UserError
from selectune.merging.delta import Delta
from selectune.models import load_base
from selectune.models.head import SplitModel
from selectune.parameters import Selection
from selectune.parameters.factors.targets import targets
from selectune.parameters.selection import Part
from tests.contracts.test_forms_and_parameters import logits, train_a_little
from tests.contracts.test_parameters import context


def form(text):
    return catalogue.create("adapters", text)


def mixed(base):
    """Some matrices whole, of others some entries, and a norm."""
    names = [target.name for target in targets(base)]
    weights = dict(base.model.named_parameters())
    norm = base.anatomy.blocks[1].norms[0]
    parts = {name: Part(tuple(weights[name].shape)) for name in names[::2] if weights[name].dim() == 2}
    parts |= {name: Part(tuple(weights[name].shape), "elements", range(3, 400, 7)) for name in names[1::2]}
    return Selection(dict(sorted((parts | {norm: Part(tuple(weights[norm].shape))}).items())))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_whole_matrices_get_an_adapter_and_the_rest_trains_in_place(architecture, tiny_folders, tmp_path):
    base = load_base(tiny_folders[architecture])
    original = {name: value.clone() for name, value in base.model.named_parameters()}
    selection = mixed(base)
    made = form("sparse_and_low_rank:rank=2,alpha=4")
    assert logits(made.apply(base, selection, 0)).equal(logits(load_base(tiny_folders[architecture]).model))
    model = base.model
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert sum(value.numel() for value in trained.values()) == made.count(base, selection)
    assert all(value.dtype == torch.float32 for value in trained.values())
    low_rank = sum(value.numel() for name, value in trained.items() if ".lora_" in name)
    layers = made.split(base, selection)[0]
    assert low_rank == 2 * sum(sum(selection.parts[f"{name}.weight"].shape) for name in layers) > 0
    train_a_little(model, base)
    after = logits(model)
    made.save(model, base, selection, tmp_path)
    loaded = load_specialist(load_base(tiny_folders[architecture]), tmp_path)
    assert torch.allclose(logits(loaded), after, atol=1e-4)
    for name, value in loaded.named_parameters():
        mask = selection.mask(name) if selection.covers(name) else torch.zeros(value.shape, dtype=torch.bool)
        assert torch.equal(value[~mask], original[name][~mask]), name
        if name.removesuffix(".weight") in layers:
            assert torch.linalg.matrix_rank((value - original[name]).double(), rtol=1e-4) <= 2
            assert not torch.equal(value, original[name])
    assert Delta.load(tmp_path, load_base(tiny_folders[architecture])).selection == selection


def test_a_selection_without_whole_matrices_is_masked_training_and_one_of_whole_matrices_is_lora(llama_folder):
    results = {}
    for name in ("full", "sparse_and_low_rank"):
        base = load_base(llama_folder)
        selection = catalogue.create("parameters", "speft:score=magnitude,density=0.02").select(context(base))
        model = form(name).apply(base, selection, 0)
        train_a_little(model, base)
        results[name] = logits(model)
    assert torch.equal(results["full"], results["sparse_and_low_rank"])
    for name in ("lora:rank=8,alpha=8", "sparse_and_low_rank"):
        base = load_base(llama_folder)
        selection = Selection.of(base.model, [target.name for target in targets(base)])
        model = form(name).apply(base, selection, 0)
        train_a_little(model, base)
        results[name] = logits(model)
    assert torch.allclose(results["lora:rank=8,alpha=8"], results["sparse_and_low_rank"], atol=1e-5)


def test_spt_and_its_form_train_what_spt_counted(llama_folder):
    base = load_base(llama_folder)
    made = context(base)
    selection = catalogue.create("parameters", "spt:rank=2,density=0.02,examples=4").select(made)
    assert f"{form('sparse_and_low_rank:rank=2').count(base, selection):,} parameters train" in made.notes[0]


def test_shira_trains_the_chosen_entries_and_no_filler(llama_folder, tmp_path):
    base = load_base(llama_folder)
    original = {name: value.clone() for name, value in base.model.named_parameters()}
    selection = catalogue.create("parameters", "speft:score=magnitude,density=0.02").select(context(base))
    made = form("shira")
    model = made.apply(base, selection, 0)
    train_a_little(model, base)
    after = logits(model)
    made.save(model, base, selection, tmp_path)
    loaded = load_specialist(load_base(llama_folder), tmp_path)
    assert torch.allclose(logits(loaded), after, atol=1e-5)
    merged = loaded.merge_and_unload()
    for name, value in merged.named_parameters():
        mask = selection.mask(name) if selection.covers(name) else torch.zeros(value.shape, dtype=torch.bool)
        assert torch.equal(value[~mask], original[name][~mask]), name
        assert not selection.covers(name) or not torch.equal(value, original[name])


def test_shira_steps_as_training_in_place_does(llama_folder):
    results = {}
    for name in ("full", "shira"):
        base = load_base(llama_folder)
        selection = catalogue.create("parameters", "speft:score=magnitude,density=0.02,targets=mlp").select(context(base))
        model = form(name).apply(base, selection, 0)
        optimiser = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.05)
        split = SplitModel(model)
        for _ in range(3):
            ids = torch.tensor([[5, 9, 11, 5, 7, 30, 31, 9]])
            hidden = split.hidden(input_ids=ids)
            catalogue.create("objectives", "cross_entropy").total(split.logits, hidden, ids).backward()
            optimiser.step()
            optimiser.zero_grad()
        results[name] = logits(model)
    assert not torch.allclose(results["full"], logits(load_base(llama_folder).model), atol=1e-2)
    assert torch.allclose(results["full"], results["shira"], atol=2e-3)


def test_shira_draws_at_random_by_the_seed_where_matrices_are_whole(llama_folder):
    found = []
    for seed in (0, 0, 1):
        base = load_base(llama_folder)
        model = form("shira:rank=4").apply(base, Selection.all(base.model), seed)
        layer = model.base_model.model.model.layers[1].mlp.up_proj
        assert layer.shira_weight["default"].numel() == 4 * (64 + 128)
        found.append(layer.shira_indices["default"].clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_osf_moves_nothing_of_the_large_directions(llama_folder):
    base = load_base(llama_folder)
    name = "model.layers.1.mlp.up_proj"
    weight = base.model.get_submodule(name).weight.detach().clone()
    model = form("osf:kept=0.5").apply(base, Selection.all(base.model), 0)
    trained = [value for value in model.parameters() if value.requires_grad]
    split = SplitModel(model)
    ids = torch.tensor([[5, 9, 11, 5, 7, 30, 31, 9]])
    catalogue.create("objectives", "cross_entropy").total(split.logits, split.hidden(input_ids=ids), ids).backward()
    torch.optim.SGD(trained, lr=0.01).step()
    change = model.merge_and_unload().get_submodule(name).weight - weight
    left, _, right = torch.linalg.svd(weight.double())
    assert change.abs().max() > 1e-5
    assert (left[:, :32].T @ change.double()).abs().max() < 1e-3 * change.abs().max()
    assert (change.double() @ right[:32].T).abs().max() < 1e-3 * change.abs().max()


def test_supertuning_takes_the_largest_weights(llama_folder):
    base = load_base(llama_folder)
    weight = base.model.get_submodule("model.layers.1.mlp.up_proj").weight.detach().clone()
    model = form("supertuning:density=0.05,rank=2").apply(base, Selection.all(base.model), 0)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    taken = layer.supertuning_indices["default"].long()
    assert set(taken.tolist()) == set(weight.abs().view(-1).topk(len(taken)).indices.tolist())
    assert abs(len(taken) - 0.05 * weight.numel()) <= 1


@pytest.mark.parametrize("name", ["shira", "osf", "supertuning"])
def test_another_kind_of_layer_is_refused(name, tiny_folders):
    base = load_base(tiny_folders["gpt2"])
    with pytest.raises(UserError, match="linear layers only"):
        form(name).apply(base, Selection.all(base.model), 0)


def test_entries_that_one_rank_cannot_hold_are_refused(llama_folder):
    base = load_base(llama_folder)
    dense = Selection.of(base.model, ["model.layers.0.mlp.up_proj.weight"])
    part = Part((128, 64), "rows", range(127))
    wrong = Selection(
        {"model.layers.0.mlp.up_proj.weight": part, "model.layers.0.self_attn.k_proj.weight": Part((32, 64), "rows", [1])}
    )
    with pytest.raises(UserError, match="one rank"):
        form("shira").apply(base, wrong, 0)
    with pytest.raises(UserError, match="no linear layer"):
        form("shira").apply(base, Selection.of(base.model, ["model.norm.weight"]), 0)
    assert form("shira").count(base, dense) == 16 * (128 + 64)


@pytest.mark.parametrize("name", ["shira", "osf", "supertuning", "sparse_and_low_rank"])
def test_a_bf16_base_trains_in_fp32(name, llama_folder, tmp_path):
    base = load_base(llama_folder, dtype=torch.bfloat16)
    selection = Selection.of(base.model, [target.name for target in targets(base)])
    made = form(name)
    model = made.apply(base, selection, 0)
    assert all(value.dtype == torch.float32 for value in model.parameters() if value.requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model)
        train_a_little(model, base)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(logits(model), before)
    made.save(model, base, selection, tmp_path)
    assert logits(load_specialist(load_base(llama_folder, dtype=torch.bfloat16), tmp_path)).isfinite().all()
