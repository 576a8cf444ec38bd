"""Metrics of the target, and drift from the base."""

import pytest
import torch

from selectune.data import Encoder, Message, Record
from selectune.errors import UserError
from selectune.evaluation import Scorer, choose_metric, evaluate_target, measure_forgetting
from selectune.evaluation.target import answers_match, extract_answer, macro_f1
from tests.tiny import tiny, tokenizer


def chat(question, response, **values):
    return Record(values.pop("kind", "chat"), (Message("user", question), Message("assistant", response)), **values)


@pytest.mark.parametrize(("text", "answer"), [
    ("48/2 = 24.\n#### 1,072", "1072"), ("The answer is Paris.", "paris"), (r"so \boxed{x+1}", "x+1"), ("  Notch 23. ", "notch 23"),
    ("Answer: $5", "5"),
])  # fmt: skip
def test_answers_are_extracted(text, answer):
    assert extract_answer(text) == answer


def test_numbers_match_by_the_last_one_said():
    assert answers_match("first 3, then 7 boxes", "#### 7")
    assert not answers_match("7 boxes, then 3", "#### 7")
    assert answers_match("1,000.0", "1000") and not answers_match("", "7")
    assert answers_match("red lamp.", "Red lamp") and not answers_match("the red lamp", "red lamp")


def test_the_metric_follows_the_shape():
    assert choose_metric([chat("q", "a b", kind="choice", choices=("a b", "c"), answer=0)]) == "choice"
    assert choose_metric([chat("q", "yes", kind="classification", choices=("yes", "no"), answer=0)]) == "classification"
    assert choose_metric([chat("q", "Paris")]) == "exact_match"
    assert choose_metric([chat("q", "a long answer of many words that nobody could match exactly")]) == "perplexity"
    assert choose_metric([Record("text", text="words")]) == "perplexity"


def test_macro_f1_by_hand():
    assert macro_f1(["a", "a", "b", "b"], ["a", "b", "b", "b"]) == pytest.approx((2 / 3 + 0.8) / 2)


def test_choices_are_scored_per_character_after_the_prompt_of_training():
    model, words = tiny("llama"), tokenizer()
    records = [chat(f"Which is {i}?", "fox", kind="choice", choices=("fox", "lazy dog", "42"), answer=0) for i in range(4)]
    encoder = Encoder(words, 128)
    target, loss = evaluate_target(records, "auto", Scorer(model, words), encoder)
    assert (target.name, loss.name) == ("target", "target/answer_nll")
    for item in target.items:
        record = next(r for r in records if r.key[:16] == item.id)
        scores = []
        for choice in record.choices:
            prompt, ids = encoder.prompt_ids(record.prompt), words(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            rows = logits[len(prompt) - 1 : -1]
            scores.append(rows.gather(-1, torch.tensor(ids)[:, None]).sum().item() / len(choice))
        assert item.prediction == record.choices[scores.index(max(scores))]


def test_forgetting_is_nothing_for_the_base_and_exact_for_another():
    base, other, words = tiny("llama"), tiny("llama", seed=3), tokenizer()
    words.model_max_length = 1 << 20
    base.config.max_position_embeddings = other.config.max_position_embeddings = 4096
    before, after = measure_forgetting(base, base, words)
    assert [b.score for b in before] == [a.score for a in after] and after[1].score == 0 and after[2].score == 1
    _, moved = measure_forgetting(base, other, words)
    from selectune.evaluation.probe import load_general_prompts

    prompt = load_general_prompts()[0]
    piece = Encoder(words, 1024).encode(chat(prompt.prompt, prompt.response))[0]
    ids, labels = torch.tensor([piece.input_ids]), torch.tensor(piece.labels)
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits[0, :-1].log_softmax(-1)[labels[1:] != -100] for m in (base, other))
    expected = (ours.exp() * (ours - theirs)).sum(-1).mean().item()
    assert moved[1].items[0].value == pytest.approx(expected, rel=1e-3)


def test_answers_longer_than_the_context_are_left_out_and_told_where_nothing_else_is_measured():
    model, words = tiny("llama"), tokenizer()
    records = [chat(f"Question {i}?", "lamp " * 400) for i in range(3)]
    scorer, encoder = Scorer(model, words), Encoder(words, 32, long_records="drop")
    assert [one.name for one in evaluate_target(records, "exact_match", scorer, encoder, max_new_tokens=2)] == ["target"]
    with pytest.raises(UserError, match=r"none of the 3 test records"):
        evaluate_target(records, "perplexity", scorer, encoder)
