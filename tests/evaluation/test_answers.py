"""Answers written together are those written alone, token by token."""

import pytest
import torch

from selectune.evaluation import answers as answers_module
from selectune.evaluation.answers import Writer, shared_beginning
from selectune.evaluation.engine import Engine
from selectune.evaluation.scorer import Scorer
from selectune.models.attention_of_answers import STEP, Answers
from tests.tiny import ARCHITECTURES, tiny, tokenizer


def prompts(shared, count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.randint(3, 250, (length,), generator=generator).tolist()

    start = text(shared)
    return [start + text(3 + 5 * (number % 4)) for number in range(count)]


def alone(model, words, prompt, limit):
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == words.eos_token_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mistral", "qwen3"])
@pytest.mark.parametrize("shared", [0, 30])
def test_answers_are_those_of_one_prompt_alone(architecture, shared):
    model, words = tiny(architecture), tokenizer()
    engine = Engine(model, False, 48)
    found = dict(Writer(engine, words, 20, (), places=3).write(prompts(shared)))
    assert engine.writes_together == (None if architecture == "gemma2" else True)
    for number, prompt in enumerate(prompts(shared)):
        assert found[number] == words.decode(alone(model, words, prompt, 20), skip_special_tokens=True)


@pytest.mark.parametrize("window", [16, 64])
def test_sliding_windows(window):
    model, words = tiny("mistral", sliding_window=window), tokenizer()
    found = Scorer(model, words).generate(prompts(20), 12, batch_size=3)
    expected = [words.decode(alone(model, words, prompt, 12), skip_special_tokens=True) for prompt in prompts(20)]
    assert found == expected


def test_answers_longer_than_the_room_at_first():
    model, words = tiny("llama"), tokenizer()
    words.eos_token = words.convert_ids_to_tokens(399)  # let answers run on
    model.generation_config.eos_token_id = None
    found = Scorer(model, words).generate(prompts(0, 3), STEP + 20, batch_size=3)
    for text, prompt in zip(found, prompts(0, 3), strict=True):
        assert text == words.decode(alone(model, words, prompt, STEP + 20), skip_special_tokens=True)


def test_stop_strings():
    model, words = tiny("qwen2"), tokenizer()
    free = Scorer(model, words).generate(prompts(0), 20)
    mark = free[0][2:4]
    stopped = Scorer(model, words).generate(prompts(0), 20, stop=[mark])
    assert stopped == [text.split(mark)[0] for text in free]


def test_wrong_attention_is_not_taken(monkeypatch):
    def forgetful(self, layer, query, key, value):
        return value.repeat_interleave(query.shape[2], 1)  # sees nothing but the last token

    monkeypatch.setattr(Answers, "attend", forgetful)
    model, words = tiny("llama"), tokenizer()
    engine = Engine(model, False, 2048)
    found = dict(Writer(engine, words, 10, (), places=4).write(prompts(0)))
    assert engine.writes_together is False
    assert found[0] == words.decode(alone(model, words, prompts(0)[0], 10), skip_special_tokens=True)


def test_an_answer_that_ends_makes_place():
    """The last answer takes its number, with all that it has seen."""
    kept = {0: (torch.arange(12.0).view(1, 6, 2), torch.arange(12.0).view(1, 6, 2) + 100)}
    answers = Answers({})
    answers.enter(kept, [1, 2, 3])
    answers.leave(0)
    assert answers.lengths == [3, 2]
    assert torch.equal(answers._own[0][0][0, 0, :3], kept[0][0][0, 3:6])
    answers.enter({0: tuple(states[:, :1] for states in kept[0])}, [1])
    assert answers.lengths == [3, 2, 1] and answers._own[0][0].shape[0] == 3


def test_shared_beginnings():
    assert shared_beginning(prompts(30)) >= 30
    assert shared_beginning([[1] * 40, [1] * 40]) == 39
    assert shared_beginning(prompts(5)) == 0 and shared_beginning([[1] * 40]) == 0
    assert answers_module.SHORTEST_PREFIX > 5
