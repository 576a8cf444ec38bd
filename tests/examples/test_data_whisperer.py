"""Data Whisperer: boundaries, attention against a plain run, shares and worths against their definitions."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from selectune.data import Message, Record
from selectune.errors import UserError
from selectune.examples import data_whisperer
from selectune.examples.data_whisperer import Whispered, attention_kept, overlap, shares, shown
from tests.examples.test_signals import RECORDS, pool


def test_boundaries_are_those_of_the_turns(llama_folder):
    made = pool(llama_folder)
    found = shown(made.encoder, RECORDS[1:3], RECORDS[4])
    words, ids = made.base.tokenizer, found.piece.input_ids
    text = [words.decode(ids[a:b]) for a, b in zip(found.bounds, [*found.bounds[1:], found.answer], strict=True)]
    assert text[0].startswith("What is fault 1?") and text[0].rstrip().endswith("is on.<|im_end|>")
    assert text[1].startswith("<|im_start|>user\nWhat is fault 2?") and text[1].rstrip().endswith("is on.<|im_end|>")
    assert "What is fault 4?" in text[2] and text[2].endswith("<|im_start|>assistant\n")
    assert words.decode([label for label in found.piece.labels if label != -100]) == RECORDS[4].response + "<|im_end|>"
    sizes = np.diff([0, *found.bounds, found.answer, len(ids)])
    assert sizes.sum() == len(ids) and (sizes > 0).all()
    assert shown(made.encoder, RECORDS[:9], RECORDS[4]) is None  # does not fit


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_attention_is_that_of_a_plain_run_and_the_model_is_as_before(tiny_folders, architecture):
    base = pool(tiny_folders[architecture]).base
    ids, before = torch.tensor([list(range(3, 40))]), base.model.config._attn_implementation
    with attention_kept(base, 2) as kept, torch.no_grad():
        base.model(input_ids=ids, use_cache=False)
        found = kept[0]
    assert base.model.config._attn_implementation == before
    assert not any(module._forward_hooks for module in base.model.modules())
    base.model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = base.model(input_ids=ids, use_cache=False, output_attentions=True).attentions[2]
    assert torch.equal(found, wanted)


def test_shares_are_mean_attention_and_equal_attention_is_shared_evenly():
    attention = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
    bounds, answer = [2, 4, 7], 10
    found = shares(attention, bounds, answer)
    means = [attention[:, 7:10, 2:4].double().sum(0).mean().item(), attention[:, 7:10, 4:7].double().sum(0).mean().item()]
    assert found == pytest.approx(np.array(means) / sum(means), rel=1e-5) and found.sum() == pytest.approx(1)
    assert shares(torch.ones(3, 12, 12), bounds, answer) == pytest.approx([0.5, 0.5])


def test_one_demonstration_is_worth_the_mean_of_its_questions(llama_folder):
    made = pool(llama_folder, RECORDS[:6], target=RECORDS[6:9])
    method = Whispered(count=2, demonstrations=1, questions=3)
    found = method.score(made)["worth as a demonstration"]
    for number in (0, 3):
        likelihoods = []
        for asked in RECORDS[6:9]:
            piece = shown(made.encoder, RECORDS[number : number + 1], asked).piece
            ids, labels = torch.tensor([piece.input_ids]), torch.tensor([piece.labels])
            with torch.no_grad():
                likelihoods.append(float(torch.exp(-made.base.model(input_ids=ids, labels=labels, use_cache=False).loss)))
        assert found[number] == pytest.approx(np.mean(likelihoods), rel=1e-3)
    together = Whispered(count=2, demonstrations=2, questions=1).score(made)["worth as a demonstration"]
    assert (together > 0).all() and not np.allclose(together, found)


def test_what_an_answer_is_worth_is_shared_by_the_attention_of_the_layer(llama_folder, monkeypatch):
    made = pool(llama_folder, RECORDS[:2], target=RECORDS[6:7])
    layers: list[int] = []
    kept = data_whisperer.attention_kept
    monkeypatch.setattr(data_whisperer, "attention_kept", lambda base, layer: layers.append(layer) or kept(base, layer))
    for share in (0.0, 0.4, 1.0):
        found = Whispered(count=1, demonstrations=2, questions=1, layer=share).score(made)["worth as a demonstration"]
    assert layers == [0, 1, 3]
    possible = []
    for order in ([0, 1], [1, 0]):
        prompt = shown(made.encoder, [RECORDS[number] for number in order], RECORDS[6])
        with torch.no_grad(), kept(made.base, 3) as attention:
            said = made.base.model(
                torch.tensor([prompt.piece.input_ids]), labels=torch.tensor([prompt.piece.labels]), use_cache=False
            )
        worth = float(torch.exp(-said.loss)) * shares(attention[0][0], prompt.bounds, prompt.answer)
        possible.append(worth[order])
    assert any(found == pytest.approx(one, rel=1e-3) for one in possible)


def test_of_few_together_none_is_worth_more_for_it(llama_folder, monkeypatch):
    made = pool(llama_folder, RECORDS[:4], target=RECORDS[6:7])
    monkeypatch.setattr(Whispered, "_read", lambda self, pool, piece: 0.5)
    monkeypatch.setattr(
        data_whisperer, "shares", lambda attention, bounds, answer: np.full(len(bounds) - 1, 1 / (len(bounds) - 1))
    )
    monkeypatch.setattr(data_whisperer, "attention_kept", lambda base, layer: nullcontext([[None]]))
    found = Whispered(count=1, demonstrations=3, questions=1).score(made)["worth as a demonstration"]
    assert found == pytest.approx(np.full(4, 0.5 / 3))  # three together, and one alone


def test_questions_that_are_too_long_are_told(llama_folder):
    long = Record("chat", (Message("user", "Tell me. " * 30), Message("assistant", "lamp 7")))
    made = pool(llama_folder, RECORDS[:4], target=[long, RECORDS[6]])
    Whispered(count=1, questions=1, longest=200).score(made)
    assert made.notes == ["1 of 2 questions are not asked: more than 50 tokens"]
    made = pool(llama_folder, RECORDS[:4], target=[long])
    with pytest.raises(UserError, match=r"examples\.longest.*no question fits"):
        Whispered(count=1, questions=1, longest=200).select(made)


def test_without_a_target_no_record_answers_a_question_of_its_own_half(llama_folder):
    made = pool(llama_folder, RECORDS[:9])
    prompts = list(Whispered(count=2, demonstrations=3, questions=4)._prompts(made, made.encoder, RECORDS[:9], []))
    assert len(prompts) > 8 and {record.key for batch, _ in prompts for record in batch} == set(made.keys)
    assert not any(asked in batch for batch, asked in prompts)


def test_generated_answers_halves_and_records_that_do_not_fit(llama_folder, monkeypatch):
    long = Record("chat", (Message("user", "Tell me."), Message("assistant", "word " * 400)))
    made = pool(llama_folder, [*RECORDS, long])
    found = Whispered(count=2, longest=256).score(made)["worth as a demonstration"]
    assert found[-1] == 0 and (found[:9] > 0).all() and any("256" in note for note in made.notes)

    class Right:
        def __init__(self, *options):
            pass

        def answers(self, prompts, **options):
            return [["49 is ON."] if prompt[-1].content == RECORDS[7].question else ["no"] for prompt in prompts]

    monkeypatch.setattr("selectune.inference.responder.LocalResponder", Right)
    answers = [Record("chat", (Message("user", RECORDS[7].question), Message("assistant", "49 is on."))), RECORDS[8]]
    made = pool(llama_folder, RECORDS[:6], target=answers)
    exact = Whispered(count=2, worth="exact", demonstrations=1, questions=2).score(made)["worth as a demonstration"]
    assert exact == pytest.approx(np.full(6, 0.5))
    loose = Whispered(count=2, worth="overlap", demonstrations=1, questions=2).score(made)["worth as a demonstration"]
    assert loose == pytest.approx(np.full(6, 0.5))
    assert overlap("the red lamp is on", "the lamp was on") == pytest.approx(2 * 3 / 9) and overlap("", "a") == 0
