"""The fast scorer gives what the slow, obvious way gives."""

import pytest
import torch

from selectune.evaluation.scorer import Scorer
from tests.tiny import ARCHITECTURES, tiny, tokenizer


def questions(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.randint(3, 250, (length,), generator=generator).tolist()

    pairs = []
    for number in range(6):
        context = text(3 + 4 * number)
        pairs += [(context, text(1 + (number + choice) % 5)) for choice in range(4)]
    return pairs


def slow(model, pairs):
    found = []
    for context, continuation in pairs:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([context + continuation]), use_cache=False).logits[0].float().log_softmax(-1)
        rows = scores[len(context) - 1 : -1]
        wanted = torch.tensor(continuation)
        found.append((rows.gather(-1, wanted[:, None]).sum().item(), bool((rows.argmax(-1) == wanted).all())))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_tokens", [40, 4096])
def test_log_likelihoods(architecture, batch_tokens):
    model = tiny(architecture)
    expected = slow(model, questions())
    found = Scorer(model, tokenizer(), batch_tokens=batch_tokens).loglikelihoods(questions())
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_decisions_in_bf16_are_those_of_fp32():
    exact = tiny("llama")
    rounded = tiny("llama").to(torch.bfloat16)
    exact.load_state_dict({name: value.float() for name, value in rounded.state_dict().items()})
    pairs = questions(1) + questions(2) + questions(3)

    def decisions(scores):
        return [max(range(4), key=lambda i: scores[start + i][0]) for start in range(0, len(scores), 4)]

    found = Scorer(rounded, tokenizer(), bfloat16=True).loglikelihoods(pairs)
    assert decisions(found) == decisions(slow(exact, pairs))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers(architecture):
    model, words = tiny(architecture), tokenizer()
    start = torch.arange(5, 25).tolist()
    prompts = [start + extra for extra in ([30], [31, 32, 33], [34, 35])]
    found = Scorer(model, words).generate(prompts, 12, batch_size=2)
    for prompt, text in zip(prompts, found, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt])
            for _ in range(12):
                token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
                if token == words.eos_token_id:
                    break
                ids = torch.cat([ids, token.view(1, 1)], -1)
        assert text == words.decode(ids[0, len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_token_losses(architecture):
    model = tiny(architecture)
    texts = [list(range(5, 20)), list(range(40, 47))]
    for text, losses in zip(texts, Scorer(model, tokenizer()).token_nll(texts), strict=True):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([text])).logits[0, :-1].log_softmax(-1)
        assert losses == pytest.approx((-scores.gather(-1, torch.tensor(text[1:])[:, None])).squeeze(-1).tolist(), abs=1e-3)
