"""The contract of every form, on tiny models of several architectures.

Whatever the form: only what was selected changes, and a saved specialist gives the logits of the trained one.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from selectune import catalogue
from selectune.adapters import load_specialist
from selectune.data import Encoder, Message, Record
from selectune.errors import UserError
from selectune.meter import Meter
from selectune.models import load_base
from selectune.models.head import SplitModel
from selectune.parameters import Context, Selection
from tests.tiny import ARCHITECTURES

DECIDES = {"mindskip"}
"""Forms whose trained routers may still decide as the base does."""
FORMS = [name for name in catalogue.methods("adapters") if name != "qlora"]
RECORDS = [
    Record("chat", (Message("user", f"What is fault {i}?"), Message("assistant", f"Fault {i} means lamp {i * 7}.")))
    for i in range(6)
]


def context(base, seed=0):
    return Context(base, Encoder(base.tokenizer, 128), RECORDS, [], torch.Generator().manual_seed(seed), Meter("choose"))


def select(method, base, seed=0):
    values = {"method": method} | ({"k": 2} if "k" in catalogue.methods("parameters")[method].model_fields else {})
    return catalogue.create("parameters", values).select(context(base, seed))


def train_a_little(model, base, steps=3):
    pieces = [piece for record in RECORDS for piece in Encoder(base.tokenizer, 128).encode(record)]
    trained = [value for value in model.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    split = SplitModel(model)
    objective = catalogue.create("objectives", "cross_entropy")
    for step in range(steps):
        for piece in pieces[step % 2 :: 2]:  # accumulates
            hidden = split.hidden(input_ids=torch.tensor([piece.input_ids]))
            objective.total(split.logits, hidden, torch.tensor([piece.labels])).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 30)[None], use_cache=False).logits


LINEAR_ONLY = {"osf", "shira", "supertuning"}
"""Forms that PEFT has for linear layers; gpt2's are of another kind."""
CASES = [(form, base) for form in FORMS for base in ARCHITECTURES if not (base == "gpt2" and form in LINEAR_ONLY)]


@pytest.mark.parametrize("form", sorted(LINEAR_ONLY))
def test_a_base_without_linear_layers_is_refused_in_one_line(form, tiny_folders):
    base = load_base(tiny_folders["gpt2"])
    with pytest.raises(UserError, match="linear layers only") as error:
        catalogue.create("adapters", form).apply(base, select("all", base), seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["all", "last_blocks"])
@pytest.mark.parametrize(("form", "architecture"), CASES)
def test_only_the_selection_changes_and_survives_saving(form, method, architecture, tiny_folders, tmp_path):
    base = load_base(tiny_folders[architecture])
    original = {name: value.clone() for name, value in base.model.state_dict().items()}
    selection = select(method, base)
    made = catalogue.create("adapters", form)
    plain = logits(base.model)
    model = made.apply(base, selection, seed=0)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert sum(dict(model.named_parameters())[name].numel() for name in trained) == made.count(base, selection)
    before = logits(model)
    assert torch.allclose(before, plain, rtol=0, atol=1e-3 if made.rounds else 0)  # a form starts at the base
    train_a_little(model, base)
    after = logits(model)
    assert form in DECIDES or not torch.equal(before, after)
    for name, value in model.named_parameters():
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if own in original and name not in trained:
            assert torch.equal(value, original[own]), name
    made.save(model, base, selection, tmp_path)
    loaded = load_specialist(load_base(tiny_folders[architecture]), tmp_path)
    assert torch.allclose(logits(loaded), after, atol=1e-3 if made.rounds else 1e-5)
    if hasattr(loaded, "merge_and_unload"):
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded), plain)
        try:
            merged = loaded.merge_and_unload()
        except UserError as error:
            assert "\n" not in error.problem
        else:
            merged.save_pretrained(tmp_path / "merged")
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
            assert torch.allclose(logits(again), after, atol=1e-3)


def test_an_untrained_lora_is_the_base_and_seeds_decide(llama_folder):
    found = []
    for seed in (0, 0, 1):
        base = load_base(llama_folder)
        before = logits(base.model)
        model = catalogue.create("adapters", "lora").apply(base, Selection.all(base.model), seed)
        assert torch.equal(logits(model), before)
        found.append(next(v.clone() for n, v in model.named_parameters() if "lora_A" in n))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_lora_is_the_base_plus_the_scaled_product(llama_folder):
    base = load_base(llama_folder)
    weight = base.model.model.layers[1].mlp.up_proj.weight.clone()
    model = catalogue.create("adapters", "lora:rank=4,alpha=8").apply(base, Selection.all(base.model), 0)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    by_hand = weight + layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (8 / 4)
    state = torch.randn(3, weight.shape[1])
    assert torch.allclose(layer(state), state @ by_hand.T, atol=1e-4)


def test_plain_peft_loads_the_adapter(llama_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = load_base(llama_folder)
    made = catalogue.create("adapters", "lora")
    model = made.apply(base, Selection.all(base.model), 0)
    train_a_little(model, base)
    made.save(model, base, Selection.all(base.model), tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_folder), tmp_path)
    assert torch.allclose(logits(plain.eval()), logits(model), atol=1e-5)


def test_qlora_trains_on_a_four_bit_base(llama_folder, tmp_path):
    base = load_base(llama_folder, dtype=torch.bfloat16, quantised=True)
    made = catalogue.create("adapters", "qlora")
    model = made.apply(base, Selection.all(base.model), 0)
    packed = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.clone()
    with torch.autocast("cpu", torch.bfloat16):
        train_a_little(model, base)
    with torch.autocast("cpu", torch.bfloat16):  # anew: autocast keeps the casts of the weights it has met
        after = logits(model)
    gradients = [v for n, v in model.named_parameters() if "layers.0" in n and "lora_B" in n]
    assert all(value.abs().sum() > 0 for value in gradients)  # the gradient reached the lowest block through 4-bit layers
    assert torch.equal(model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight, packed)
    made.save(model, base, Selection.all(base.model), tmp_path)
    again = load_specialist(load_base(llama_folder, dtype=torch.bfloat16, quantised=True), tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(logits(again), after, atol=1e-2)
