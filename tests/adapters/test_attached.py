"""Forms beside the layers: SSF, SCT and LoFiT against their formulas, and what was folded against what was attached."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from selectune import catalogue
from selectune.adapters import ssf
from selectune.adapters.attached import attach, attachments
from selectune.data import Encoder, Message, Record
from selectune.errors import UserError
from selectune.meter import Meter
from selectune.models import load_base
from selectune.parameters import Context, Selection
from selectune.parameters.factors.patching import output_of
from selectune.parameters.lofit import Scale
from selectune.parameters.selection import Part
from tests.contracts.test_forms_and_parameters import RECORDS, logits

OUTPUT = "model.layers.1.self_attn.o_proj"


def context(base):
    return Context(base, Encoder(base.tokenizer, 128), RECORDS, [], torch.Generator().manual_seed(0), Meter("choose"), quiet=True)


def scatter(model, seed=0):
    """Give every attachment's parameters random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in attachments(model).values():
            for value in one.parameters():
                value += 0.3 * torch.randn(value.shape, generator=generator)
    return model


def heads_of(base, *heads, block=1):
    lines = [head * 16 + place for head in heads for place in range(16)]
    return Selection({f"model.layers.{block}.self_attn.o_proj.weight": Part((64, 64), "columns", lines)})


def test_lofit_adds_its_offset_to_its_heads_and_to_no_other(llama_folder):
    base = load_base(llama_folder)
    form = catalogue.create("adapters", "lofit")
    selection = heads_of(base, 0, 3)
    assert form.count(base, selection) == 2 * 16
    states = torch.randn(5, 64)
    layer = base.model.get_submodule(OUTPUT)
    weight = layer.weight.clone()
    model = scatter(form.apply(base, selection, 0))
    moved = states.clone()
    moved[:, :16] += attachments(model)[OUTPUT].offset[0]
    moved[:, 48:] += attachments(model)[OUTPUT].offset[1]
    assert torch.allclose(layer(states), moved @ weight.T, atol=1e-5)
    assert [name for name, value in model.named_parameters() if value.requires_grad] == [f"{OUTPUT}.beside.offset"]


@pytest.mark.parametrize("form", ["lofit", "ssf", "sct:bias=true"])
@torch.no_grad()
def test_folded_is_attached_and_generates_the_same_with_a_cache(form, llama_folder):
    base = load_base(llama_folder)
    made = catalogue.create("adapters", form)
    model = scatter(made.apply(base, Selection.all(base.model), 0))
    ids = torch.arange(3, 20)[None]
    attached, told = logits(model), model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=2)
    assert not torch.allclose(attached, logits(load_base(llama_folder).model), atol=1e-1)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not attachments(merged) and not hasattr(merged, "disable_adapter")
    assert torch.allclose(logits(merged), attached, atol=2e-3, rtol=1e-4)
    assert torch.equal(merged.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=2), told)
    assert torch.equal(logits(model), attached)  # the copy was merged, not the model


def test_where_there_is_no_room_for_a_bias_folding_is_refused(tiny_folders):
    for architecture in ("mixtral", "qwen2"):
        base = load_base(tiny_folders[architecture])
        model = catalogue.create("adapters", "lofit").apply(base, Selection.all(base.model), 0)
        with pytest.raises(UserError, match="can have no bias"):
            model.merge_and_unload()


def test_ssf_scales_and_shifts_every_layer_and_norm(llama_folder):
    base = load_base(llama_folder)
    form = catalogue.create("adapters", "ssf")
    wide = sum(base.model.get_submodule(name).weight.shape[0] for block in base.anatomy.blocks for name in block.linears)
    norms = sum(base.anatomy.sizes[name] for block in base.anatomy.blocks for name in block.norms) + 64
    assert form.count(base, Selection.all(base.model)) == 2 * wide + norms
    states, layer = torch.randn(5, 64), base.model.model.layers[2].mlp.up_proj
    weight = layer.weight.clone()
    scatter(form.apply(base, Selection.all(base.model), 0))
    one = layer.beside
    assert torch.allclose(layer(states), (states @ weight.T) * one.scale + one.shift, atol=1e-5)
    norm = base.model.model.norm
    assert norm.beside.shift is None
    assert torch.allclose(
        norm(states),
        torch.nn.functional.rms_norm(states, (64,), norm.weight, norm.variance_epsilon) * norm.beside.scale,
        atol=1e-4,
    )


@pytest.mark.parametrize("kind", ["linear", "linear_without_bias", "conv1d", "norm"])
@torch.no_grad()
def test_a_folded_layer_is_the_layer_scaled_and_shifted(kind):
    torch.manual_seed(0)
    layer = {"linear": torch.nn.Linear(8, 6), "linear_without_bias": torch.nn.Linear(8, 6, bias=False), "conv1d": Conv1D(6, 8),
             "norm": torch.nn.LayerNorm(8)}[kind]  # fmt: skip
    one = ssf.ScaleAndShift(8 if kind == "norm" else 6, shifted=True)
    for value in [*layer.parameters(), *one.parameters()]:
        value.normal_()
    states = torch.randn(5, 8, dtype=torch.float64)
    expected = copy.deepcopy(layer).double()(states) * one.scale + one.shift
    shift = one.fold(layer)
    assert torch.allclose(layer.double()(states) + shift, expected, atol=1e-5)


def test_a_scale_beside_a_norm_is_the_norms_weight(llama_folder):
    base = load_base(llama_folder)
    norm, states, wanted = base.model.model.norm, torch.randn(5, 64), torch.randn(5, 64)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    plain = copy.deepcopy(norm).requires_grad_(True)
    (of_weight,) = torch.autograd.grad((plain(states) * wanted).sum(), plain.weight)
    catalogue.create("adapters", "ssf:shift=false").apply(base, Selection.all(base.model), 0)
    (of_scale,) = torch.autograd.grad((norm(states) * wanted).sum(), norm.beside.scale)
    assert torch.allclose(of_scale, of_weight * plain.weight, atol=1e-4)  # scale x weight moves as a weight alone would


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sct_changes_its_channels_and_no_other(architecture, tiny_folders):
    base = load_base(tiny_folders[architecture])
    name = OUTPUT if architecture == "llama" else "transformer.h.1.attn.c_proj"
    form = "rows" if architecture == "llama" else "columns"
    layer = base.model.get_submodule(name)
    states = torch.randn(5, 64)
    before = layer(states).detach()
    made = catalogue.create("adapters", "sct")
    selection = Selection({f"{name}.weight": Part((64, 64), form, [3, 10, 50])})
    assert made.count(base, selection) == 9
    model = scatter(made.apply(base, selection, 0))
    after, chosen = layer(states).detach(), [3, 10, 50]
    others = [place for place in range(64) if place not in chosen]
    assert torch.equal(after[:, others], before[:, others])
    assert torch.allclose(after[:, chosen], before[:, chosen] + before[:, chosen] @ attachments(model)[name].map.T, atol=1e-5)


def test_salient_channels_are_those_of_the_largest_norm(llama_folder):
    base = load_base(llama_folder)
    chosen = catalogue.create("parameters", "sct:examples=6").select(context(base))
    states = {}
    handle = base.model.get_submodule(OUTPUT).register_forward_hook(
        lambda _, __, y: states.setdefault("seen", []).append(y[0, 1:])
    )
    for record in RECORDS:
        (piece,) = Encoder(base.tokenizer, 128).encode(record)
        base.model(input_ids=torch.tensor([piece.input_ids]))
    handle.remove()
    whole = torch.cat(states["seen"])
    norms = (whole / whole.square().mean(-1, keepdim=True).sqrt()).norm(dim=0)
    assert chosen.parts[f"{OUTPUT}.weight"].index.tolist() == sorted(norms.argsort(descending=True)[:8].tolist())
    assert len(chosen.parts) == 4


def test_files_have_one_voice_each_in_the_salience_of_channels(llama_folder):
    base = load_base(llama_folder)
    asked = context(base)
    asked.train = [replace(record, source="short" if number == 0 else "long") for number, record in enumerate(RECORDS)]
    scores = catalogue.create("parameters", "sct:examples=6").scores(asked)
    seen = {"short": [], "long": []}
    for record in asked.train:
        (piece,) = Encoder(base.tokenizer, 128).encode(record)
        handle = base.model.get_submodule(OUTPUT).register_forward_hook(
            lambda _, __, y, of=record.source: seen[of].append(y[0, 1:])
        )
        base.model(input_ids=torch.tensor([piece.input_ids]))
        handle.remove()
    norms = []
    for states in (torch.cat(each) for each in seen.values()):
        norms.append((states / states.square().mean(-1, keepdim=True).sqrt()).norm(dim=0))
    (found,) = (score for target, score in scores.items() if target.name == f"{OUTPUT}.weight")
    assert torch.allclose(found.float(), (norms[0] + norms[1]) / 2, rtol=1e-4)


@torch.no_grad()
def test_scales_of_zero_leave_the_base_and_others_multiply_what_the_heads_give(llama_folder):
    base = load_base(llama_folder)
    plain, layer, states = logits(base.model), base.model.get_submodule(OUTPUT), torch.randn(5, 64)
    for block in base.anatomy.blocks:
        attach(base.model.get_submodule(output_of(block)), Scale(64))
    assert torch.equal(logits(base.model), plain)
    scatter(base.model)
    assert torch.allclose(layer(states), (states * (1 + layer.beside.scale)) @ layer.weight.T, atol=1e-4)


def test_the_scale_of_a_head_is_heeded_in_fp32_whatever_the_model_computes_in():
    one = Scale(64)
    one.scale.data.fill_(3e-3)  # in bf16 1.003 is 1
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    (scaled,) = one.before(torch.nn.Identity(), (states,))
    assert not torch.equal(scaled, states) and torch.equal(scaled, (states.float() * (1 + one.scale)).bfloat16())


def test_lofit_takes_the_heads_whose_scales_moved_most(llama_folder):
    base = load_base(llama_folder)
    method = catalogue.create("parameters", "lofit:k=3,steps=3")
    scales = method.scales(context(base))
    assert scales.shape == (4, 4, 16) and scales.abs().min() > 0
    worst = sorted((-float(scales[b, h].norm()), b, h) for b in range(4) for h in range(4))[:3]
    selection = method.select(context(base))
    for block in range(4):
        part = selection.parts.get(f"model.layers.{block}.self_attn.o_proj.weight")
        expected = sorted(h * 16 + i for _, b, h in worst if b == block for i in range(16))
        assert (part.index.tolist() if part else []) == expected
    strong = catalogue.create("parameters", "lofit:k=3,steps=3,penalty=1000").scales(context(base))
    assert strong.abs().mean() < scales.abs().mean()


@pytest.mark.parametrize("architecture", ["gemma2", "qwen2", "mixtral", "gpt2"])
@torch.no_grad()
def test_scales_alone_fold_into_every_architecture(architecture, tiny_folders):
    base = load_base(tiny_folders[architecture])
    plain = logits(base.model)
    model = scatter(catalogue.create("adapters", "ssf:shift=false").apply(base, Selection.all(base.model), 0))
    attached = logits(model)
    assert not torch.allclose(attached, plain, atol=1e-1)
    assert torch.allclose(logits(model.merge_and_unload()), attached, atol=2e-3, rtol=1e-3)


def test_norms_that_add_one_are_told_by_what_they_do():
    class Plus(torch.nn.Module):
        def __init__(self, more):
            super().__init__()
            self.weight, self.more = torch.nn.Parameter(torch.full((4,), 0.3)), more

        def forward(self, states):
            return states * (self.more + self.weight)

    for norm, expected in (
        (Plus(1.0), 1.0),
        (Plus(0.0), 0.0),
        (torch.nn.LayerNorm(4), 0.0),
        (torch.nn.LayerNorm(4, bias=False), 0.0),
    ):
        with torch.no_grad():
            before = norm.weight.clone()
            assert ssf._offset(norm) == expected and torch.equal(norm.weight, before)


def test_a_record_without_room_is_passed_over_by_sct(llama_folder):
    base = load_base(llama_folder)
    unread = Record("chat", (Message("user", "lamp " * 300), Message("assistant", "on")))
    plain, mixed = context(base), context(base)
    mixed.train = [unread, *RECORDS]
    chosen = [catalogue.create("parameters", "sct:examples=20").select(asked).parts for asked in (plain, mixed)]
    assert {name: part.index.tolist() for name, part in chosen[0].items()} == {
        name: part.index.tolist() for name, part in chosen[1].items()
    }
