"""MindSkip: the faithful-if lines of the card."""

import pytest
import torch

from selectune import catalogue
from selectune import recipe as recipes
from selectune.adapters.attached import attachments
from selectune.errors import UserError
from selectune.evaluation import Scorer
from selectune.evaluation.engine import PLAIN, Engine
from selectune.models import load_base
from selectune.parameters import Selection
from selectune.pipeline import Chain
from selectune.run import Run
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


def called(module):
    """Count how often a module computes."""
    found = []
    module.register_forward_hook(lambda *_: found.append(1))
    return found


@torch.no_grad()
def test_what_nobody_keeps_is_not_computed_and_the_result_is_the_same(llama_folder):
    model, found = routed(llama_folder)
    projections = [called(layer.self_attn.o_proj) for layer in model.model.layers]
    ids = torch.arange(3, 43).view(2, 20)
    whole = []
    for keep in ([0, 0], [0, 1]):
        found[1].decide = lambda states, positions, keep=keep: torch.tensor(keep).float()[:, None].expand(states.shape[:2])
        found[1].returns = None  # as before the first call: computed, and multiplied
        whole.append(model(input_ids=ids).logits)
    assert [len(one) for one in projections] == [2, 2, 2, 2]
    found[1].decide = lambda states, positions: torch.zeros(states.shape[:2])
    assert torch.equal(model(input_ids=ids).logits, whole[0]) and not torch.equal(whole[0], whole[1])
    assert [len(one) for one in projections] == [3, 2, 3, 3]
    with torch.enable_grad():
        assert torch.equal(model(input_ids=ids).logits, whole[0])


@torch.no_grad()
@pytest.mark.parametrize("skipped", [[0, 1, 2], [0], [2], [1, 2]])
def test_what_is_skipped_keeps_no_keys_and_text_is_the_same(skipped, llama_folder):
    from transformers import DynamicCache

    model, found = routed(llama_folder)
    model(input_ids=torch.tensor([[3]]))
    for number, one in enumerate(found):
        one.decide = lambda states, positions, keep=number not in skipped: torch.full(states.shape[:2], float(keep))
    ids = torch.tensor([[2] * 4 + list(range(3, 19)), list(range(20, 40))])
    mask = torch.tensor([[0] * 4 + [1] * 16, [1] * 20])
    cache = DynamicCache(config=model.config)
    told = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=2, past_key_values=cache)
    lengths = [cache.get_seq_length(layer) for layer in range(4)]
    assert lengths == [0 if layer in skipped and layer else 25 for layer in range(4)], (
        "how long a cache is, is read off the first"
    )
    for row, begin in ((0, 4), (1, 0)):
        text = ids[row : row + 1, begin:]
        for _ in range(6):
            text = torch.cat([text, model(input_ids=text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(told[row, begin:], text[0])
    more = torch.cat([told, told[:, -3:]], 1)  # more of the text at once, behind what is kept
    mask = torch.cat([mask, torch.ones(2, 9, dtype=torch.int64)], 1)
    positions = mask.cumsum(1)[:, 25:] - 1
    for one in found:
        one.decide = lambda states, positions: torch.ones(states.shape[:2])  # the prompt's decision holds all the same
    behind = model(input_ids=more[:, 25:], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    cache.batch_select_indices(torch.tensor([1]))  # and where a sequence has left
    last = model(input_ids=more[1:, :1], position_ids=torch.tensor([[29]]), past_key_values=cache).logits
    for number, one in enumerate(found):
        one.decide = lambda states, positions, keep=number not in skipped: torch.full(states.shape[:2], float(keep))
    whole = model(input_ids=torch.cat([more[1:], more[1:, :1]], 1), use_cache=False).logits[0, 25:]
    assert torch.allclose(torch.cat([behind[1], last[0]]), whole, atol=1e-4)


def test_rows_are_left_as_they_are_where_a_decision_depends_on_them(llama_folder):
    model, _ = routed(llama_folder)  # of which two short questions show nothing: nobody skips yet
    assert Engine(model, fast=False, row_tokens=512).way == PLAIN
    assert Engine(load_base(llama_folder).model, fast=False, row_tokens=512).way != PLAIN


@torch.no_grad()
def test_scores_are_those_of_each_question_by_itself(llama_folder):
    generator = torch.Generator().manual_seed(3)
    model, _ = routed(llama_folder, *(torch.randn(64, generator=generator) for _ in range(3)))
    drawn = torch.randint(3, 250, (6, 30), generator=generator).tolist()
    asked = [([*drawn[0][:20], *one[:9]], one[10 : 12 + number]) for number, one in enumerate(drawn[1:])]
    found = Scorer(model, load_base(llama_folder).tokenizer).loglikelihoods(asked)
    for (context, continuation), (score, _) in zip(asked, found, strict=True):
        said = model(input_ids=torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        assert abs(float(said.gather(1, torch.tensor(continuation)[:, None]).sum()) - score) < 1e-3


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


@pytest.mark.parametrize("blocks", [2, 12])
def test_each_router_is_charged_the_cost_however_many_there_are(blocks, llama_folder):
    base = load_base(llama_folder)
    model = catalogue.create("adapters", f"mindskip:cost=0.5,blocks={blocks}").apply(base, Selection.all(base.model), 0)
    model.train()
    for one in attachments(model).values():
        gate = one.gate(torch.ones(2, 7, 64), torch.nn.Identity(), {})
        (0 * gate).sum().backward()
        assert torch.allclose(one.weight.grad, torch.full((64,), 0.5 * 0.25))  # the slope of a sigmoid at 0


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


@pytest.mark.parametrize(("form", "best"), [("mindskip", False), ("first", False), ("lora", True)])
def test_a_run_with_a_cost_beside_the_loss_ends_with_its_last_checkpoint(form, best, tmp_path):
    chain = Chain(Run(tmp_path), recipes.parse({"form": form}), quiet=True)
    assert chain.training.training.keep_best == best
