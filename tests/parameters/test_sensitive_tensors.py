"""What tensors answer to: repair of forgetting, work and credit, rounding, strata."""

import copy
import itertools

import pytest
import torch

from selectune import catalogue
from selectune.data import Message, Record
from selectune.errors import UserError
from selectune.merging.repair import repair
from selectune.models import load_base
from selectune.parameters import Selection
from selectune.parameters.factors.gradients import first, rows_of
from selectune.parameters.factors.roles import weights_by_role
from selectune.parameters.factors.sensitivity import sensitivities
from selectune.parameters.factors.targets import targets
from selectune.parameters.forgetting_prioritised import movement
from selectune.parameters.greentrainer import Work, backward_share, within, work
from selectune.parameters.quantisation_critical import rounded
from tests.contracts.test_parameters import RECORDS, context
from tests.tiny import save_tiny


def made(name, **values):
    return catalogue.create("parameters", {"method": name, **values})


@pytest.fixture
def base(llama_folder):
    return load_base(llama_folder)


# -- sensitivity and repair ------------------------------------------------------------------------------------------


def test_sensitivities_are_sums_over_passes(base):
    asked, name = context(base), "model.layers.1.mlp.up_proj.weight"
    found = sensitivities(asked, [name], RECORDS[:3], packed=False)[name]
    base.model.requires_grad_(True)
    squares = absolute = noise = 0.0
    for row in rows_of(asked, RECORDS[:3]):
        base.model.zero_grad()
        logits = base.model(input_ids=row["input_ids"][None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, row["labels"][1:], ignore_index=-100).backward()
        gradient = base.model.get_parameter(name).grad
        squares += float(gradient.square().sum())
        absolute += float(gradient.abs().mean())
        noise += float(gradient.mean() ** 2 / gradient.std(correction=0))
    assert (found.squares, found.absolute, found.signal_to_noise) == pytest.approx((squares, absolute, noise), rel=1e-3)


def test_movement_is_the_mean_change_however_tensors_are_split():
    before = {"a": torch.zeros(2, 3), "b": torch.ones(4), "c": torch.ones(2)}
    after = {"a": torch.full((2, 3), 0.5), "b": torch.tensor([1.0, 1, 1, 3]), "c": torch.ones(2)}
    found = movement(before, after, {"a": ["a"], "b": ["b"], "c": ["c"], "ab": ["a", "b"]})
    assert found == {"a": 0.5, "b": 0.5, "c": 0.0, "ab": pytest.approx((6 * 0.5 + 4 * 0.5) / 10)}


@pytest.mark.parametrize("measure", ["gradient", "movement"])
def test_the_most_sensitive_tensors_that_fit_are_chosen(base, measure):
    method = made("forgetting_prioritised", measure=measure, examples=4, steps=2)
    names = [name for block in base.anatomy.blocks for name in block.parameters]
    scores = method.scores(context(base), names)
    chosen = method.select(context(base))
    room = 0.05 * sum(base.anatomy.sizes[name] for name in names)
    kept = []
    for name in sorted(names, key=lambda name: -scores[name]):
        if base.anatomy.sizes[name] <= room - sum(base.anatomy.sizes[one] for one in kept):
            kept.append(name)
    assert chosen == Selection.of(base.model, kept) and max(scores.values()) > 0


@pytest.mark.parametrize("side", ["train", "general"])
def test_sensitivity_is_no_matter_of_how_many_records_there_are(base, side):
    """Twice the same records make twice the passes, and the same scores."""
    once, twice = context(base), context(base)
    long = [
        Record("chat", (Message("user", f"Number {i}?"), Message("assistant", "lamp " * 60))) for i in range(4)
    ]  # one to a pass
    for asked, times in ((once, 1), (twice, 2)):
        asked.train = long[:2] * (times if side == "train" else 1)
        asked.__dict__["general"] = long[2:] * (times if side == "general" else 1)
        rows = rows_of(asked, asked.train + asked.general, packed=True)
        assert len(rows) == len(asked.train + asked.general)
    method, names = (
        made("forgetting_prioritised", examples=8),
        [name for block in base.anatomy.blocks for name in block.parameters],
    )
    first, second = (method.scores(asked, names) for asked in (once, twice))
    assert first == pytest.approx(second, rel=1e-3, abs=1e-9)


def test_a_repair_changes_its_selection_alone_and_the_model_stays(base):
    tuned = copy.deepcopy(base.model)
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight += 0.5
    kept = {name: value.clone() for name, value in tuned.named_parameters()}
    selection = made("norms").select(context(base))
    mended = repair(context(base), tuned, selection, RECORDS[:2], steps=3, learning_rate=1e-2)
    for name, value in mended.named_parameters():
        assert torch.equal(value, kept[name]) != selection.covers(name), name
    assert all(torch.equal(value, kept[name]) for name, value in tuned.named_parameters())


# -- work and credit -------------------------------------------------------------------------------------------------


def test_work_follows_from_the_shapes_and_the_order_of_the_forward_pass(base):
    tensors = work(base, tokens=256, length=128)
    by_name = {one.name: one for one in tensors}
    order = [one.name.removeprefix("model.layers.0.") for one in tensors if "layers.0." in one.name]
    assert tensors[0].name == "model.embed_tokens.weight" and tensors[-1].name == "model.norm.weight"
    assert order.index("input_layernorm.weight") == 0 < order.index("self_attn.o_proj.weight") < order.index("mlp.up_proj.weight")
    up = by_name["model.layers.0.mlp.up_proj.weight"]
    assert up.own == up.passing == up.forward == 256 * 64 * 128
    value = by_name["model.layers.0.self_attn.v_proj.weight"]
    assert value.own == 256 * 64 * 32 and value.passing - value.own == 4 * 256 * 128 * 64
    tied = by_name["model.embed_tokens.weight"]
    size = base.anatomy.sizes["model.embed_tokens.weight"]
    assert (tied.passing, tied.own) == (0, 256 * size + size)
    assert {one.name for one in tensors} == set(base.anatomy.sizes)


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_brute_force_within_the_true_work(seed):
    source = torch.Generator().manual_seed(seed)
    count = 8
    own, passing = (torch.randint(1, 20, (count,), generator=source).tolist() for _ in range(2))
    credits = (torch.rand(count, generator=source) - 0.3).tolist()
    tensors = [Work(str(i), float(passing[i]), float(own[i]), 1.0) for i in range(count)]
    whole = sum(own) + sum(passing)
    for share in (0.1, 0.4, 0.8, 1.0):
        chosen = [int(name) for name in within(tensors, credits, share, grid=whole)]  # whole units: nothing is rounded

        def cost(places):
            return sum(own[i] for i in places) + (sum(passing[min(places) :]) if places else 0)

        sets = [s for size in range(count + 1) for s in itertools.combinations(range(count), size)]
        best = max(sum(credits[i] for i in s) for s in sets if cost(s) <= share * whole + 1e-9)
        assert cost(chosen) <= share * whole + 1e-9 and sum(credits[i] for i in chosen) == pytest.approx(best)
        rough = [int(name) for name in within(tensors, credits, share)]
        assert cost(rough) <= (share + 2 * count / 1000) * whole
    assert sorted(chosen) == [i for i in range(count) if credits[i] > 0]


def test_the_backward_pass_gets_what_the_forward_pass_leaves():
    tensors = [Work("a", 1.0, 1.0, 1.0)]
    assert backward_share(tensors, 1.0) == 1 and backward_share(tensors, 0.5) == pytest.approx(0.25)
    assert backward_share(tensors, 0.2) == 0.05


def test_credit_is_the_fall_of_the_loss_that_a_step_predicts(base):
    before = {name: value.clone() for name, value in base.model.named_parameters()}
    asked = context(base)
    found = made("greentrainer", examples=2, learning_rate=1e-3).credits(asked)
    assert max(abs(value) for value in found.values()) == 1
    assert all(torch.equal(value, before[name]) for name, value in base.model.named_parameters())
    rows = rows_of(asked, first(asked.train, 2))
    model = copy.deepcopy(base.model).requires_grad_(True)

    def loss():
        terms = [
            torch.nn.functional.cross_entropy(
                model(input_ids=row["input_ids"][None]).logits[0, :-1], row["labels"][1:], ignore_index=-100, reduction="sum"
            )
            for row in rows
        ]
        return sum(terms) / sum(int((row["labels"][1:] != -100).sum()) for row in rows)

    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    loss().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    loss().backward()
    credit = {name: -float((value.grad * (value - before[name])).sum()) for name, value in model.named_parameters()}
    largest = max(abs(value) for value in credit.values())
    assert found == pytest.approx({name: value / largest for name, value in credit.items()}, abs=2e-3)
    everything = made("greentrainer", examples=2, learning_rate=1e-3, ratio=1).select(context(base))
    assert everything.names() == sorted(name for name, value in found.items() if value > 0)


# -- rounding, strata ------------------------------------------------------------------------------------------------


def test_rounding_is_to_even_steps_in_groups():
    weight = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    found = rounded(weight, 4, 4)
    for row in range(5):
        for start in (0, 4, 8):
            part = weight[row, start : start + 4]
            scale = part.abs().max() / 7
            assert torch.allclose(found[row, start : start + 4], (part / scale).round() * scale, atol=1e-6)
    assert float((rounded(weight, 8, 4) - weight).norm()) < float((found - weight).norm()) / 5
    assert torch.equal(rounded(weight, 4, 10**12), rounded(weight, 4, 10))  # a whole row shares one


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_layers_with_the_largest_error_are_chosen(architecture, tiny_folders):
    base = load_base(tiny_folders[architecture])
    method = made("quantisation_critical", examples=1, bits=3, group=16, ratio=0.2)
    found = method.errors(context(base))
    asked, outputs = context(base), {}
    (row,) = rows_of(asked, first(asked.train, 1))
    name = base.anatomy.blocks[2].prefix + (".mlp.down_proj" if architecture == "llama" else ".mlp.c_proj")
    module, seen = base.model.get_submodule(name), []
    module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0][0], output[0])))
    base.model(input_ids=row["input_ids"][None])
    with torch.no_grad():
        weight = module.weight if architecture == "llama" else module.weight.t()
        exact, wrong = seen[0][0] @ weight.t(), seen[0][0] @ rounded(weight, 3, 16).t()
    outputs[name] = float((exact - wrong).norm() / exact.norm())
    assert found[name] == pytest.approx(outputs[name], rel=1e-4)
    assert len(found) == sum(len(block.linears) for block in base.anatomy.blocks)
    tops = sorted(found, key=lambda key: -found[key])[: round(0.2 * len(found))]
    assert method.select(context(base)).names() == sorted(f"{key}.weight" for key in tops)


def test_errors_are_measured_in_fp32_on_a_bf16_base_too(llama_folder):
    base, seen = load_base(llama_folder, dtype=torch.bfloat16), []
    module = base.model.get_submodule("model.layers.2.mlp.down_proj")
    module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0].float()))
    found = made("quantisation_critical", examples=1, bits=3, group=16).errors(context(base))
    weight = module.weight.detach().float()
    exact, wrong = seen[0] @ weight.t(), seen[0] @ (weight - rounded(weight, 3, 16)).t()
    assert found["model.layers.2.mlp.down_proj"] == pytest.approx(float(wrong.norm() / exact.norm()), rel=1e-6)


def test_routers_are_not_rounded(tmp_path):
    base = load_base(save_tiny("qwen2_moe", tmp_path))
    found = made("quantisation_critical", examples=1).errors(context(base))
    assert {f"{name}.weight" for name in found} == {target.name for target in targets(base) if len(target.shape) == 2}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_strata_are_exactly_the_named_tensors(architecture, tiny_folders):
    base = load_base(tiny_folders[architecture])
    chosen = made("spafit", n1=1, n2=3).select(context(base))
    blocks = base.anatomy.blocks
    small = [
        list(block.norms) if architecture == "llama" else [n for n in block.parameters if n.endswith("bias")] for block in blocks
    ]
    expected = Selection.of(base.model, [name for names in small[1:] for name in names])
    expected = expected | weights_by_role(base, "query+value", biases=False, blocks=[3])
    assert chosen == expected and not any(chosen.covers(name) for name in blocks[0].parameters)
    with pytest.raises(UserError, match="nothing trains"):
        made("spafit", n1=4, n2=4).select(context(base))
    with pytest.raises(UserError, match="n1 <= n2"):
        made("spafit", n1=3, n2=2).select(context(base))
    everywhere = made("spafit", n1=0, n2=0, roles="attention").select(context(base))
    assert all(everywhere.covers(name) for name in weights_by_role(base, "attention", biases=False).names())
