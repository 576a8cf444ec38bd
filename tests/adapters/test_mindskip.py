"""MindSkip: the faithful-if lines of the card."""

import pytest
import torch

from selectune import catalogue
from selectune.adapters.attached import attachments
from selectune.errors import UserError
from selectune.models import load_base
from selectune.parameters import Selection
from tests.contracts.test_forms_and_parameters import logits, train_a_little


def routed(folder, *weights):
    base = load_base(folder)
    model = catalogue.create("adapters", "mindskip").apply(base, Selection.all(base.model), 0)
    found = list(attachments(model).values())
    with torch.no_grad():
        for one, weight in zip(found, weights):
            one.weight += weight
    return model, found


def test_routers_lie_before_the_last_block(llama_folder):
    base = load_base(llama_folder)
    form = catalogue.create("adapters", "mindskip:blocks=2")
    assert list(form.places(base, Selection.all(base.model))) == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    last = Selection.of(base.model, list(base.anatomy.blocks[-1].parameters))
    with pytest.raises(UserError, match="beside nothing"):
        form.apply(base, last, 0)


@torch.no_grad()
def test_what_is_skipped_is_as_if_there_were_no_attention(llama_folder):
    model, found = routed(llama_folder)
    states = torch.randn(1, 9, 64)
    for one in found:
        one.decide = lambda states, positions: torch.zeros(states.shape[:2])
    skipped = logits(model)
    plain = load_base(llama_folder).model
    for block in (0, 1, 2):
        plain.model.layers[block].self_attn.o_proj.weight.zero_()
    assert torch.allclose(skipped, logits(plain), atol=1e-5)
    assert states.shape == (1, 9, 64)


@torch.no_grad()
def test_records_of_a_pack_are_decided_apart(llama_folder):
    _, found = routed(llama_folder)
    one = found[0]
    one.weight += 1.0
    states = torch.cat([torch.full((1, 3, 64), 1.0), torch.full((1, 4, 64), -1.0), torch.full((1, 2, 64), 1.0)], 1)
    states[0, 0] = -1.5  # one token against its record
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
    assert one.decide(states, positions).tolist() == [[1.0] * 3 + [0.0] * 4 + [1.0] * 2]
    assert one.decide(states, None).tolist() == [[0.0] * 9]


@torch.no_grad()
def test_the_decision_of_the_prompt_holds_while_text_is_generated(llama_folder):
    generator = torch.Generator().manual_seed(3)
    model, found = routed(llama_folder, *(torch.randn(64, generator=generator) for _ in range(3)))
    ids = torch.arange(3, 20)[None]
    told = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2)
    model(input_ids=ids, use_cache=False)
    decisions = [one.decision.clone() for one in found]
    assert 0 < sum(float(value) for value in decisions) < 3
    for one, decision in zip(found, decisions):  # whole passes without a cache, with the prompt's decisions
        one.decide = lambda states, positions, decision=decision: decision[:, None].expand(states.shape[:2])
    text = ids
    for _ in range(6):
        text = torch.cat([text, model(input_ids=text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(told, text)


def test_a_cost_makes_routers_skip_and_only_routers_train(llama_folder):
    kept = {}
    for cost in (0.0, 1000.0):
        base = load_base(llama_folder)
        before = {name: value.clone() for name, value in base.model.named_parameters()}
        model = catalogue.create("adapters", f"mindskip:cost={cost}").apply(base, Selection.all(base.model), 0)
        model.train()
        train_a_little(model, base, steps=2)
        model.eval()
        logits(model)
        kept[cost] = sum(float(one.decision) for one in attachments(model).values())
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters() if name in before)
        with pytest.raises(UserError, match="no change of weights"):
            model.merge_and_unload()
    assert kept[1000.0] < 3
