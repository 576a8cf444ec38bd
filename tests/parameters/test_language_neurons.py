"""Language-aware neurons: the faithful-if lines of the card."""

import pytest
import torch

from selectune import catalogue
from selectune.data import Encoder, Message, Record
from selectune.errors import UserError
from selectune.meter import Meter
from selectune.models import load_base
from selectune.parameters import Context
from selectune.parameters.factors.gradients import first
from selectune.parameters.factors.neurons import awareness, down_of, neurons
from selectune.parameters.language_neurons import GENERAL, labelled
from tests.contracts.test_forms_and_parameters import train_a_little

RECORDS = [
    Record("chat", (Message("user", f"{word} {i}?"), Message("assistant", f"{word} {i} is {i * 7}.")), source=word)
    for word in ("fault", "lamp")
    for i in range(3)
]


def context(base, records=RECORDS):
    return Context(base, Encoder(base.tokenizer, 64), records, [], torch.Generator().manual_seed(0), Meter("choose"), quiet=True)


def loss_with(base, piece, block=None, neuron=None, token=None):
    handle = None
    if block is not None:
        layer = base.model.get_submodule(down_of(base.anatomy.blocks[block]))

        def shrink(_, inputs):
            states = inputs[0].clone()
            states[0, token, neuron] *= 1 - 1e-2
            return (states,)

        handle = layer.register_forward_pre_hook(shrink)
    ids, labels = torch.tensor([piece.input_ids]), torch.tensor(piece.labels)
    with torch.no_grad():
        found = torch.nn.functional.cross_entropy(base.model(input_ids=ids).logits[0, :-1].double(), labels[1:])
    if handle:
        handle.remove()
    return float(found)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_awareness_is_the_first_order_change_of_the_loss(architecture, tiny_folders):
    base = load_base(tiny_folders[architecture])
    record = RECORDS[0]
    (piece,) = Encoder(base.tokenizer, 64).encode(record)
    aware, change = awareness(context(base), [record])
    plain, tokens = loss_with(base, piece), len(piece.input_ids)
    for block, neuron in ((0, 5), (1, 70), (3, int(aware[3].argmax()))):
        by_hand = sum(abs(loss_with(base, piece, block, neuron, token) - plain) for token in range(tokens)) / 1e-2 / tokens
        assert float(aware[block, neuron]) == pytest.approx(by_hand, rel=0.1, abs=1e-5)
    states = base.model(input_ids=torch.tensor([piece.input_ids]), output_hidden_states=True).hidden_states
    assert float(change[1]) == pytest.approx(float((states[2] - states[1]).abs().mean()), rel=1e-3)


def test_awareness_of_a_bf16_base_is_of_fp32_products_and_differences(llama_folder):
    base, states, slopes, moved = load_base(llama_folder, dtype=torch.bfloat16), [], [], []

    def look(_, inputs):
        states.append(inputs[0].detach().float())
        inputs[0].register_hook(lambda gradient: slopes.append(gradient.float()))

    block = base.anatomy.blocks[1]
    base.model.get_submodule(down_of(block)).register_forward_pre_hook(look)
    base.model.get_submodule(block.prefix).register_forward_hook(
        lambda _, inputs, output: moved.append(output.detach().float() - inputs[0].detach().float())
    )
    aware, change = awareness(context(base), RECORDS[:1])
    assert torch.allclose(aware[1], (states[0] * slopes[0])[0].abs().mean(0), rtol=1e-5)
    assert float(change[1]) == pytest.approx(float(moved[0].abs().mean()), rel=1e-5)


def test_labels_follow_the_rule_in_each_block():
    aware = {name: torch.rand(2, 20, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abc")}
    masks = labelled(aware, 0.3, 0.7)
    for block in range(2):
        normed = {name: (value[block] / value[block].max()).tolist() for name, value in aware.items()}
        mean = [sum(normed[n][i] for n in "abc") / 3 for i in range(20)]
        general = sorted(range(20), key=lambda i: -mean[i])[:6]
        assert masks[""][block].nonzero().squeeze(-1).tolist() == sorted(general)
        for i in set(range(20)) - set(general):
            most = max(normed[n][i] for n in "abc")
            assert [bool(masks[n][block, i]) for n in "abc"] == [normed[n][i] >= 0.7 * most for n in "abc"]
        assert (sum(masks.values()) > 0)[block].all()
        assert not any((masks[n] & masks[""]).any() for n in "abc")


def test_what_only_general_conversations_need_stays(llama_folder):
    base = load_base(llama_folder)
    method = catalogue.create("parameters", "language_neurons:k=2,examples=3,kappa=0.9,general=0.2")
    assert sorted(method.groups(context(base))) == sorted(["fault", "lamp", GENERAL])
    selection = method.select(context(base))
    blocks, masks = method.roles(context(base))
    chosen = masks[""] | masks["fault"] | masks["lamp"]
    assert (masks[GENERAL] & ~chosen)[blocks].any()
    for block in base.anatomy.blocks:
        mine = chosen[block.index].nonzero().squeeze(-1).tolist() if block.index in blocks else []
        for name, form in (("gate_proj", "rows"), ("up_proj", "rows"), ("down_proj", "columns")):
            part = selection.parts.get(f"{block.prefix}.mlp.{name}.weight")
            assert (part.index.tolist() if part else []) == mine
            assert part is None or part.form == form
    changes = sum(awareness(context(base), first([r for r in RECORDS if r.source == w], 3))[1] for w in ("fault", "lamp"))
    assert blocks == sorted(changes.argsort(descending=True)[:2].tolist())


def test_neurons_outside_stay_bit_for_bit(llama_folder):
    base = load_base(llama_folder)
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    selection = neurons(base, {1: torch.tensor([3, 9]), 2: torch.tensor([0])})
    model = catalogue.create("adapters", "full").apply(base, selection, 0)
    train_a_little(model, base)
    assert selection.count() == 3 * 3 * 64
    for key, value in before.items():
        mask = selection.mask(key) if selection.covers(key) else torch.zeros_like(value, dtype=torch.bool)
        assert torch.equal(model.state_dict()[key][~mask], value[~mask])


def test_a_mixture_is_refused(tiny_folders):
    with pytest.raises(UserError, match="mixture"):
        catalogue.create("parameters", "language_neurons:k=2").select(context(load_base(tiny_folders["mixtral"])))
