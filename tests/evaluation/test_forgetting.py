"""Drift: conversations are compared many at a time and do not see each other; what is known of the base is not read again."""

import pytest
import torch

from selectune.data import Encoder
from selectune.evaluation import Scorer, forgetting
from tests.tiny import ARCHITECTURES, tiny, tokenizer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drift_is_that_of_each_conversation_by_itself(architecture, monkeypatch):
    monkeypatch.setattr(forgetting, "POSITIONS", 8)
    base, specialist = tiny(architecture), tiny(architecture, seed=1)
    encoder = Encoder(tokenizer(), 1024)
    said = [forgetting._response(encoder, f"Why does the lamp show fault {i * 13}?", f"Lamp {i}, " * (i + 1)) for i in range(5)]
    ours, theirs = Scorer(base, tokenizer(), batch_tokens=64), Scorer(specialist, tokenizer(), batch_tokens=64)
    found = forgetting.compare(ours, theirs, said)
    for (context, response), (divergence, agreement) in zip(said, found, strict=True):
        places = range(len(context) - 1, len(context) + len(response) - 1)
        with torch.no_grad():
            p, q = (
                model(input_ids=torch.tensor([[*context, *response]])).logits[0, places].log_softmax(-1)
                for model in (base, specialist)
            )
        assert divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3) and divergence > 0.01
        assert agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()), abs=0.02)
    assert forgetting.compare(ours, ours, said) == [(0.0, 1.0)] * 5


def test_a_response_is_what_a_training_would_learn():
    encoder = Encoder(tokenizer(), 1024)
    context, response = forgetting._response(encoder, "Which lamp?", "The left one.")
    words = tokenizer()
    assert words.decode(context).rstrip().endswith("assistant") and words.decode(response).startswith("The left one.")


def test_a_known_base_is_not_read_again():
    base, specialist = tiny("llama"), tiny("llama", seed=1)
    before, after = forgetting.measure_forgetting(base, specialist, tokenizer())
    known = [item.model_copy(update={"score": 7.0}) for item in before]
    again, same = forgetting.measure_forgetting(base, specialist, tokenizer(), known=known)
    assert again[0].score == 7.0 and same == after
