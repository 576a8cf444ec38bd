"""Deltas against brute force: what differs, what is written back, what adds up; PEFT's format; several on one base."""

import copy

import pytest
import torch

from selectune.adapters import load_specialist
from selectune.adapters.full import Full
from selectune.errors import UserError
from selectune.merging.delta import ORIGINAL, Delta
from selectune.merging.files import compose
from selectune.merging.serving import Serving
from selectune.merging.shira import from_shira, to_shira
from selectune.models import load_base
from selectune.parameters.overlap import overlap, total
from selectune.parameters.selection import Part, Selection
from tests.tiny import ARCHITECTURES, save_tiny

IDS = torch.tensor([[5, 9, 30, 31, 77, 12, 200]])


def bits(model):
    views = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return {name: value.detach().clone().view(views[value.dtype]) for name, value in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def disturbed(model, seed, share=0.05, size=0.01):
    """A copy in which some entries of every tensor are moved a little."""
    generator = torch.Generator().manual_seed(seed)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for value in moved.parameters():
            where = torch.rand(value.shape, generator=generator) < share
            value += where * size * torch.randn(value.shape, generator=generator).to(value.dtype)
    return moved


@pytest.fixture(scope="module")
def bfloat16_folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("bf16"), dtype=torch.bfloat16)


@pytest.fixture(params=[*ARCHITECTURES, "bfloat16"])
def base(request, tiny_folders, bfloat16_folder):
    return load_base(bfloat16_folder if request.param == "bfloat16" else tiny_folders[request.param])


@pytest.fixture
def llama(llama_folder):
    return load_base(llama_folder)


def test_what_differs_is_what_brute_force_finds_and_both_ways_are_exact(base, tmp_path):
    specialist = disturbed(base.model, 1)
    delta = Delta.of(base, specialist)
    original, wanted = bits(base.model), bits(specialist)
    for name, value in original.items():
        differs = (value != wanted[name]).view(-1).nonzero().squeeze(-1)
        assert delta.selection.covers(name) == bool(len(differs))
        if len(differs):
            assert torch.equal(delta.selection.parts[name].flat().index, differs)
    assert 0 < delta.count() < 0.06 * base.anatomy.total_parameters
    delta.apply(base)
    assert same(bits(base.model), wanted)
    delta.revert(base)
    assert same(bits(base.model), original)
    delta.save(tmp_path / "delta")
    assert Delta.load(tmp_path / "delta") == delta == Delta.load(tmp_path / "delta", base)
    (tmp_path / "delta" / ORIGINAL).unlink()  # the base's values can come from the base
    assert Delta.load(tmp_path / "delta", base) == delta
    assert same(bits(load_specialist(base, tmp_path / "delta")), wanted)


def test_forms_of_a_support_are_the_coarsest_that_are_exact(llama):
    moved = copy.deepcopy(llama.model)
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(4)]
    with torch.no_grad():
        weights = dict(moved.named_parameters())
        weights[names[0]] += 1
        weights[names[1]][[3, 7]] += 1
        weights[names[2]][:, [2, 9]] += 1
        weights[names[3]][4, 5] = torch.nan
    parts = Delta.of(llama, moved).selection.parts
    assert [parts[name].form for name in names] == ["whole", "rows", "columns", "elements"]
    assert [parts[name].index.tolist() for name in names] == [[], [3, 7], [2, 9], [4 * 128 + 5]]


@pytest.mark.parametrize("form", ["whole", "rows", "columns", "blocks", "blocks that do not fill", "elements"])
def test_a_specialist_of_any_form_is_a_delta(form, llama_folder, tmp_path):
    base, name = load_base(llama_folder), "model.layers.2.mlp.down_proj.weight"
    part = {
        "whole": Part((64, 128)),
        "rows": Part((64, 128), "rows", [3, 9]),
        "columns": Part((64, 128), "columns", [5, 50]),
        "blocks": Part((64, 128), "blocks", [2, 11], 16),
        "blocks that do not fill": Part((64, 128), "blocks", [2, 5], 48),
        "elements": Part((64, 128), "elements", [4, 17, 8000]),
    }[form]
    selection = Selection({name: part})
    model = Full().apply(base, selection, 0)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += torch.randn(value.shape)
    Full().save(model, base, selection, tmp_path)
    fresh = load_base(llama_folder)
    delta = Delta.load(tmp_path, fresh)
    assert delta.selection == selection and delta.changed().selection == selection
    wanted = bits(load_specialist(load_base(llama_folder), tmp_path))
    delta.apply(fresh)
    assert same(bits(fresh.model), wanted)
    delta.restrict(Selection({name: Part((64, 128), "rows", [3])})).revert(fresh)  # those entries alone
    now = dict(fresh.model.named_parameters())[name]
    assert torch.equal(now[3], dict(load_base(llama_folder).model.named_parameters())[name][3])


def test_entries_that_did_not_change_can_be_left_out(llama):
    name = "model.layers.0.mlp.up_proj.weight"
    before = dict(llama.model.named_parameters())[name].detach()[[1, 2]]
    after = before.clone()
    after[1, 10] += 1
    selection = Selection({name: Part((128, 64), "rows", [1, 2])})
    delta = Delta(llama.spec, llama.fingerprint, selection, {name: before}, {name: after})
    assert delta.count() == 128 and delta.changed().count() == 1
    assert delta.changed().selection.parts[name].index.tolist() == [2 * 64 + 10]


def test_composition_is_the_sum_of_changes(base):
    original = {name: value.detach().clone() for name, value in base.model.named_parameters()}
    models = [disturbed(base.model, seed, share=0.3) for seed in (1, 2, 3)]
    one, two, three = (Delta.of(base, model) for model in models)
    all_of_them = one.compose(two, three)
    assert one.compose(two) == two.compose(one)
    assert all_of_them == three.compose(one, two) == two.compose(three, one)
    assert all_of_them.selection == one.selection | two.selection | three.selection
    all_of_them.apply(base)
    for name, value in base.model.named_parameters():
        changes = [dict(model.named_parameters())[name].double() - original[name].double() for model in models]
        assert torch.equal(value, (original[name].double() + sum(changes)).to(value.dtype)), name
    all_of_them.revert(base)
    assert same(bits(base.model), {name: value.view(bits(base.model)[name].dtype) for name, value in original.items()})


def test_an_empty_delta_is_the_identity_of_composition(llama, tmp_path):
    empty, delta = Delta.of(llama, copy.deepcopy(llama.model)), Delta.of(llama, disturbed(llama.model, 1, size=30.0))
    assert empty.count() == 0 and delta.compose(empty) == delta == empty.compose(delta) == delta.compose() == delta.minus(empty)
    empty.save(tmp_path)
    assert Delta.load(tmp_path) == empty


def test_where_others_change_nothing_the_specialists_own_value_stays(llama):
    """1 + (1e-30 - 1) is 0 in fp64; the specialist says 1e-30."""
    name = "model.norm.weight"
    ones, tiny = torch.ones(64), torch.full((64,), 1e-30)
    zero = Delta(llama.spec, llama.fingerprint, Selection({name: Part((64,))}), {name: ones}, {name: ones})
    small = Delta(llama.spec, llama.fingerprint, Selection({name: Part((64,))}), {name: ones}, {name: tiny})
    assert torch.equal(zero.compose(small).after[name], tiny)
    assert torch.equal(small.minus(zero).after[name], tiny)


def of_one_norm(base, before, after):
    name = "model.norm.weight"
    values = [torch.full((64,), value) for value in (before, after)]
    return Delta(base.spec, base.fingerprint, Selection({name: Part((64,))}), {name: values[0]}, {name: values[1]})


def test_sums_that_round_do_not_depend_on_the_order(llama):
    """(1e30 - 1e30) + 1 is 1, and 1e30 + (1 - 1e30) is 0."""
    one, two, three = (of_one_norm(llama, 0.0, after) for after in (1e30, -1e30, 1.0))
    assert one.compose(two, three) == one.compose(three, two) == three.compose(two, one) == two.compose(three, one)


def test_what_is_added_and_taken_away_at_once_is_rounded_once(llama, tmp_path):
    """2^24 + 1 is 2^24 in fp32, and 2^24 + 1 - 2^24 is 1."""
    great, small = (of_one_norm(llama, 0.0, after) for after in (2.0**24, 1.0))
    great.save(tmp_path / "great")
    small.save(tmp_path / "small")
    assert compose([tmp_path / "great", tmp_path / "small"], [tmp_path / "great"], tmp_path / "sum") == small
    assert great.compose(small).minus(great) != small


def test_bits_count_and_not_numbers(llama):
    """-0.0 is another value than 0.0, equal NaNs are none; changes that cancel leave the base's own zero."""
    moved = copy.deepcopy(llama.model)
    for model, first in ((llama.model, 0.0), (moved, -0.0)):
        with torch.no_grad():
            model.model.norm.weight[:2] = torch.tensor([first, torch.nan])
    delta = Delta.of(llama, moved)
    assert delta.count() == 1 and delta.after["model.norm.weight"].signbit().all()
    delta.apply(llama)
    assert same(bits(llama.model), bits(moved))
    cancelled = of_one_norm(llama, -0.0, 1.0).compose(of_one_norm(llama, -0.0, -1.0))
    assert cancelled.changed().count() == 0 and cancelled.after["model.norm.weight"].signbit().all()


def test_difference_of_two(llama):
    one, two = (Delta.of(llama, disturbed(llama.model, seed, share=0.3)) for seed in (1, 2))
    both = one.minus(two)
    assert both.selection == one.selection | two.selection and one.minus(one).changed().count() == 0
    for name in both.selection.names():
        changes = [torch.zeros(both.selection.parts[name].shape, dtype=torch.float64) for _ in range(3)]
        for delta, change in zip((one, two, both), changes, strict=True):
            if delta.selection.covers(name):
                delta.selection.parts[name].put(change, delta.changes(name))
        torch.testing.assert_close(changes[2], changes[0] - changes[1], rtol=0, atol=1e-6)


def test_supports_obey_the_algebra_of_selections(llama):
    one, two = (Delta.of(llama, disturbed(llama.model, seed, share=0.4)) for seed in (1, 2))
    inside, outside = one.restrict(two.selection), one.restrict(one.selection - two.selection)
    assert inside.selection == one.selection & two.selection and inside.count() + outside.count() == one.count()
    assert inside.compose(outside) == one and outside.compose(inside) == one


def test_overlap_counts_what_masks_count(llama):
    one, two = (Delta.of(llama, disturbed(llama.model, seed, share=0.4)).selection for seed in (1, 2))
    found = overlap(one, two)
    for name, each in found.items():
        left, right = one.mask(name), two.mask(name)
        assert (each.one, each.other, each.both) == (int(left.sum()), int(right.sum()), int((left & right).sum()))
        assert each.jaccard == int((left & right).sum()) / int((left | right).sum())
        assert each.share_of_one == each.both / each.one and each.share_of_other == each.both / each.other
    whole = total(found.values())
    assert whole.both == (one & two).count() and whole.union == (one | two).count()
    assert abs(whole.by_chance / whole.both - 1) < 0.1  # these are independent
    with pytest.raises(UserError, match="one model"):
        overlap(Selection({"a": Part((2, 3))}), Selection({"a": Part((3, 2))}))


def test_mistakes(llama, tiny_folders, tmp_path):
    other = load_base(tiny_folders["qwen2"])
    delta = Delta.of(llama, disturbed(llama.model, 1))
    with pytest.raises(UserError, match="no specialist of"):
        Delta.of(llama, other.model)
    with pytest.raises(UserError, match="another base"):
        delta.apply(other)
    with pytest.raises(UserError, match="different bases"):
        delta.compose(Delta.of(other, disturbed(other.model, 1)))
    with pytest.raises(UserError, match="is not applied"):
        delta.revert(llama)
    delta.apply(llama)
    before = bits(llama.model)
    with pytest.raises(UserError, match="on them already"):
        delta.apply(llama)
    assert same(bits(llama.model), before)
    delta.save(tmp_path / "d")
    (tmp_path / "d" / ORIGINAL).unlink()
    with pytest.raises(UserError, match="keeps no values of its base"):
        Delta.load(tmp_path / "d")
    (tmp_path / "d" / "changed.safetensors").unlink()
    with pytest.raises(UserError, match="not trained in place"):
        Delta.load(tmp_path / "d")
    with pytest.raises(UserError, match="holds no specialist"):
        Delta.load(tmp_path)


def test_a_base_that_was_rounded_in_memory_is_no_origin(llama_folder):
    base = load_base(llama_folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="was rounded"):
        Delta.of(base, disturbed(base.model, 1))


def test_a_base_that_carries_the_specialist_is_not_taken_for_its_origin(llama, tmp_path):
    delta, nothing = Delta.of(llama, disturbed(llama.model, 1)), Delta.of(llama, copy.deepcopy(llama.model))
    for name, one in (("delta", delta), ("nothing", nothing)):
        one.save(tmp_path / name, original=False)
        assert Delta.load(tmp_path / name, llama) == one
    load_specialist(llama, tmp_path / "delta")
    with pytest.raises(UserError, match="the base is its specialist already"):
        Delta.load(tmp_path / "delta", llama)


def test_serving_switches_exactly(base):
    models = {name: disturbed(base.model, seed, share=0.2) for name, seed in (("a", 1), ("b", 2))}
    original, wanted = bits(base.model), {name: bits(model) for name, model in models.items()}
    serving = Serving(base, {name: Delta.of(base, model) for name, model in models.items()})
    storage = {name: value.data_ptr() for name, value in base.model.named_parameters()}
    for name in ("a", "b", "b", None, "a", "b"):
        serving.use(name)
        assert serving.active == name and same(bits(serving.model), wanted[name] if name else original)
    with serving.using("a") as model:
        assert same(bits(model), wanted["a"])
    assert serving.active == "b"
    serving.remove("b")
    assert serving.active is None and serving.names() == ["a"] and same(bits(serving.model), original)
    assert storage == {name: value.data_ptr() for name, value in base.model.named_parameters()}  # nothing was copied
    for what in (serving.use, serving.remove):
        with pytest.raises(UserError, match="did you mean 'a'"):
            what("aa")
    serving.use("a")
    with torch.no_grad():  # somebody else changes the base
        next(base.model.parameters()).mul_(1.5)
    with pytest.raises(UserError, match="do not hold the base's values"):
        serving.add("c", Delta.of(load_base(base.source), models["b"]))


def linears(base):
    names = [f"{name}.weight" for block in base.anatomy.blocks for name, role in block.linears.items() if role != "router"]
    return Selection.of(base.model, names)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_peft_loads_a_delta_and_gives_it_back(architecture, tiny_folders, tmp_path):
    from peft import PeftModel

    base = load_base(tiny_folders[architecture])
    delta = Delta.of(base, disturbed(base.model, 1, size=1e-4)).restrict(linears(base))
    sizes = {part.count() for part in delta.selection.parts.values()}
    assert len(sizes) > 3  # layers of many densities, which one rank must hold
    missed = to_shira(delta, base, tmp_path)
    back = from_shira(tmp_path, base)
    assert back.selection == delta.selection
    assert back == delta if missed == 0 else back.count() == delta.count()
    off = 0
    for name, part in back.selection.parts.items():
        wanted = part.take(delta._spread(name, delta.after[name]))
        off += int((back.after[name] != wanted).sum())
    assert off == missed < 0.002 * delta.count()
    back.apply(base)
    with torch.no_grad():
        wanted = base.model(IDS).logits
        back.revert(base)
        plain = base.model(IDS).logits
        found = PeftModel.from_pretrained(base.model, tmp_path)(IDS).logits
    assert torch.equal(found, wanted) and not torch.equal(plain, wanted)


def test_entries_that_move_a_little_come_back_bit_for_bit(llama, tmp_path):
    """Where a weight moves by less than half of itself the fp32 change is exact."""
    moved = copy.deepcopy(llama.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in linears(llama).names():
            value = dict(moved.named_parameters())[name]
            where = torch.rand(value.shape, generator=generator) < 0.1
            value *= 1 + where * 0.3 * (torch.rand(value.shape, generator=generator) - 0.5)
    delta = Delta.of(llama, moved)
    assert to_shira(delta, llama, tmp_path) == 0 and from_shira(tmp_path, llama) == delta


def test_a_zero_that_only_changes_its_sign_stays_an_entry_and_is_counted_as_missed(llama, tmp_path):
    name, part = "model.layers.0.mlp.up_proj.weight", Part((128, 64), "elements", [3, 9, 70])
    before, after = torch.tensor([0.0, 1.0, -0.0]), torch.tensor([-0.0, 2.0, 0.0])
    part.put(llama.model.get_parameter(name).data, before)
    delta = Delta(llama.spec, llama.fingerprint, Selection({name: part}), {name: before}, {name: after})
    assert to_shira(delta, llama, tmp_path) == 1
    back = from_shira(tmp_path, llama)
    assert back.selection == delta.selection and back.after[name].signbit().tolist() == [False, False, False]


def test_an_adapter_that_peft_saved_is_a_delta(llama_folder, tmp_path):
    from peft import ShiraConfig, get_peft_model

    base = load_base(llama_folder)
    config = ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], init_weights=False, random_seed=3, task_type="CAUSAL_LM")
    adapted = get_peft_model(base.model, config).eval()
    with torch.no_grad():
        wanted = adapted(IDS).logits
    adapted.save_pretrained(tmp_path)
    fresh = load_base(llama_folder)
    delta = from_shira(tmp_path, fresh)
    assert delta.count() == 4 * 2 * ((64 + 64) + (64 + 128))
    delta.apply(fresh)
    with torch.no_grad():
        assert torch.equal(fresh.model(IDS).logits, wanted)


def test_what_is_no_shira_adapter_is_said(llama, tiny_folders, tmp_path):
    delta = Delta.of(llama, disturbed(llama.model, 1))
    with pytest.raises(UserError, match="not the weight of a linear layer"):
        to_shira(delta, llama, tmp_path / "x")
    dense = Delta.of(llama, disturbed(llama.model, 1, share=0.9)).restrict(linears(llama))
    with pytest.raises(UserError, match="too many entries for SHiRA"):
        to_shira(dense, llama, tmp_path / "x")
    gpt2 = load_base(tiny_folders["gpt2"])
    with pytest.raises(UserError, match="not the weight of a linear layer"):
        to_shira(Delta.of(gpt2, disturbed(gpt2.model, 1)).restrict(linears(gpt2)), gpt2, tmp_path / "x")
    with pytest.raises(UserError, match="holds no adapter"):
        from_shira(tmp_path, llama)
    small = delta.restrict(linears(llama))
    to_shira(small, llama, tmp_path / "y")
    with pytest.raises(UserError, match="another base"):
        from_shira(tmp_path / "y", load_base(tiny_folders["qwen2"]))
