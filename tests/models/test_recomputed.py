"""What is computed again has the values and gradients of what would have been kept, and is not kept."""

from collections import Counter

import pytest
import torch

from selectune.models.gated import short_gated_units
from selectune.models.norms import short_norms
from selectune.models.recomputed import is_recomputed, recomputed_by, recomputing
from selectune.parameters.selection import Part, Selection
from selectune.training.partial import entries, train_entries
from tests.tiny import ARCHITECTURES, OTHERS, tiny

UNITS = {"llama", "gemma2", "qwen2", "mistral", "gemma", "gemma3_text", "qwen3"}
IDS = torch.arange(3, 40)[None]


def gradients(model, short):
    """Logits and gradients of a model, plainly or with all that is short."""
    model.zero_grad()
    if not short:
        logits = model(input_ids=IDS, use_cache=False).logits
        logits.float().pow(2).mean().backward()
    else:
        with short_norms(model), short_gated_units(model):
            with recomputing():
                logits = model(input_ids=IDS, use_cache=False).logits
            logits.float().pow(2).mean().backward()
    return logits.detach().float(), {n: v.grad.float() for n, v in model.named_parameters() if v.grad is not None}


def assert_alike(one, other, bound):
    assert torch.allclose(one[0], other[0], rtol=bound, atol=bound)
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        assert (value - other[1][name]).norm() <= bound * value.norm().clamp(min=1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_values_and_gradients_are_those_of_the_model(architecture, dtype):
    model = tiny(architecture).to(dtype)
    with short_gated_units(model) as count:
        assert count == 4 * (architecture in UNITS) + 4 * (architecture == "qwen2_moe")  # its shared experts
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert_alike(gradients(model, False), gradients(model, True), 1e-4 if dtype == torch.float32 else 6e-2)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
def test_fp32_weights_in_autocast(architecture):
    model, found = tiny(architecture), []
    for short in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, short))
    assert_alike(*found, 6e-2)


@pytest.mark.parametrize("form", ["rows", "columns", "blocks", "elements"])
def test_parts_of_weights_take_their_gradient_from_what_is_computed_again(form):
    plain, model = tiny("llama"), tiny("llama")
    model.load_state_dict(plain.state_dict())
    block = model.model.layers[2]
    parts = {}
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        shape = tuple(block.get_submodule(name).weight.shape)
        parts[f"model.layers.2.{name}.weight"] = Part(shape, form, torch.arange(3) * 2, 16 if form == "blocks" else 1)
    selection = Selection(parts)
    train_entries(model, selection)
    gradients(model, True)
    gradients(plain.requires_grad_(True), False)
    for name, values in entries(model).items():
        assert torch.allclose(values.grad, parts[name].take(plain.get_parameter(name).grad), atol=1e-6, rtol=1e-4), name


def test_an_adapter_with_dropout_draws_the_same():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", init_lora_weights=False)
    model, found = get_peft_model(tiny("llama"), config).train(), []
    with short_gated_units(model) as count:
        assert count == 4
    for short in (False, True):
        torch.manual_seed(1)
        found.append(gradients(model, short))
    assert_alike(*found, 1e-4)


def test_of_a_block_only_what_cannot_be_had_cheaply_is_kept():
    model, kept = tiny("llama").requires_grad_(False), []
    for block in model.model.layers:
        for layer in ("q_proj", "k_proj", "v_proj"):
            getattr(block.self_attn, layer).weight.requires_grad_(True)
        for layer in ("gate_proj", "up_proj", "down_proj"):
            getattr(block.mlp, layer).weight.requires_grad_(True)
    with short_norms(model), short_gated_units(model), recomputing(kept.append):
        model(input_ids=IDS, use_cache=False)
    own = {value.untyped_storage().data_ptr() for value in model.parameters()}
    wide = {value.data_ptr(): value for value in kept if value.data_ptr() not in own and value.shape[-1] == 128}
    sizes = Counter(tuple(value.shape[-2:]) for value in wide.values())
    assert sizes == {(37, 128): 8}  # of four units gate and up; neither the activation nor the product


def test_what_is_saved_twice_is_made_once_and_another_storage_is_no_match():
    made, weight = [], torch.randn(5, 5, requires_grad=True)

    def again():
        made.append(1)
        return torch.ones(3, 5)

    with recomputing():
        value = recomputed_by(torch.ones(3, 5, requires_grad=True) * 1, again)
        assert is_recomputed(value.view(15)) and not is_recomputed(value.clone())
        total = (value @ weight).sum() + (value[1:] @ weight).sum()
        del value
        other = torch.full((3, 5), 7.0)  # perhaps where the value was
        total = total + (other @ weight).sum()
    total.backward()
    assert len(made) == 1
    assert torch.equal(weight.grad, torch.full((5, 5), 3.0 + 2.0 + 21.0))


def test_a_tensor_with_a_recipe_is_kept_where_nothing_is_recomputed():
    weight = torch.randn(5, 5, requires_grad=True)
    value = recomputed_by(torch.ones(3, 5), lambda: pytest.fail("made again"))
    (value @ weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((5, 5), 3.0))


def test_sparse_tensors_are_kept_as_they_are():
    """Those of PEFT's sparse adapter."""
    kept, value = [], torch.tensor([2.0, 3.0], requires_grad=True)
    with recomputing(lambda one: kept.append(one.numel())):
        recomputed_by(torch.ones(1, requires_grad=True) * 1, lambda: torch.ones(1))
        sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), value, (4,))
        found = (sparse * sparse).to_dense().sum()  # a product keeps its factors
    found.backward()
    assert value.grad.tolist() == [4.0, 6.0] and sum(kept) >= 4
