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


def test_decisions_between_contexts_in_bf16_are_those_of_fp32():
    """One continuation behind each of several contexts, as WinoGrande asks: the question is known by its name only."""
    exact, rounded = tiny("qwen2"), tiny("qwen2").to(torch.bfloat16)
    exact.load_state_dict({name: value.float() for name, value in rounded.state_dict().items()})
    generator = torch.Generator().manual_seed(4)
    pairs, names = [], []
    for number in range(40):
        context = torch.randint(3, 250, (12,), generator=generator).tolist()
        ending = torch.randint(3, 250, (3,), generator=generator).tolist()
        for choice in (5, 6):  # contexts that differ in one early token: scores lie close together
            pairs.append(([choice, *context], ending))
            names.append(number)

    def decisions(scores):
        return [scores[start][0] > scores[start + 1][0] for start in range(0, len(scores), 2)]

    scorer = Scorer(rounded, tokenizer(), bfloat16=True)
    assert decisions(scorer.loglikelihoods(pairs, questions=names)) == decisions(slow(exact, pairs))
    assert scorer.questions == 40 and scorer.decided_again >= 12


def test_greedy_flags_in_bf16_are_those_of_fp32():
    exact, rounded = tiny("llama"), tiny("llama").to(torch.bfloat16)
    exact.load_state_dict({name: value.float() for name, value in rounded.state_dict().items()})
    pairs = []
    for number in range(60):
        context = [3 + number, 7, 9 + 2 * number]
        with torch.no_grad():
            two = exact(input_ids=torch.tensor([context])).logits[0, -1].topk(2).indices.tolist()
        pairs.append((context, [two[number % 2]]))
    found = Scorer(rounded, tokenizer(), bfloat16=True).loglikelihoods(pairs)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in slow(exact, pairs)]


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
