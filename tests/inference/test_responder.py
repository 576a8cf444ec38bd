"""Answers of a local model: greedy ones are those of a plain loop, drawn ones follow the model's distribution and nothing but their question."""

import collections

import pytest
import torch

from selectune.data import Encoder, Message
from selectune.docstrings import of_attributes
from selectune.examples import Pool
from selectune.inference.local import LocalResponder
from selectune.inference.remembering import Question
from selectune.inference.responder import Asking, responder
from selectune.models import load_base


def asked(*texts):
    return [[Message("user", text)] for text in texts]


@pytest.fixture(scope="module")
def base(llama_folder):
    return load_base(llama_folder)


def local(base, kept=None):
    return LocalResponder(base, Encoder(base.tokenizer, 128), kept=kept, quiet=True)


def test_a_part_in_fp32_answers_as_the_whole_in_bf16_does(llama_folder):
    """So a copy answers whose trained part is kept exactly: the products are in bf16, and what is exact in bf16 stays what it was."""
    whole, mixed = (load_base(llama_folder, dtype=torch.bfloat16) for _ in range(2))
    for name, weight in mixed.model.named_parameters():
        if "proj" in name:
            weight.data = weight.data.float()
    questions, how = asked("Which lamp?", "And fault 7, which one is that?"), {"max_new_tokens": 12}
    assert local(mixed).answers(questions, **how) == local(whole).answers(questions, **how)
    drawn = local(mixed).answers(questions, samples=2, temperature=1.0, **how)
    assert drawn == local(whole).answers(questions, samples=2, temperature=1.0, **how)


def alone(base, text, count):
    """Greedy tokens, one forward pass each."""
    ids = Encoder(base.tokenizer, 128).prompt_ids((Message("user", text),))
    start = len(ids)
    while len(ids) - start < count:
        token = int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == base.tokenizer.eos_token_id:
            break
        ids.append(token)
    return base.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_a_greedy_answer_is_the_one_of_the_model_alone(base):
    texts = ["What is fault 17?", "Hi", "Question: how many lamps are red? Tell me all of them."]
    found = local(base).answers(asked(*texts), max_new_tokens=12)
    assert found == [[alone(base, text, 12)] for text in texts]
    assert local(base).answers(asked("Hi"), samples=3, max_new_tokens=12) == [[alone(base, "Hi", 12)] * 3]


def test_a_drawn_answer_follows_its_question_and_seed_alone(base):
    texts = ["What is fault 17?", "Hi", "How many?"]
    drawn = {"samples": 3, "temperature": 1.0, "max_new_tokens": 8}
    together = local(base).answers(asked(*texts), seed=5, **drawn)
    apart = [local(base).answers(asked(text), seed=5, **drawn)[0] for text in reversed(texts)][::-1]
    assert together == apart
    assert together != local(base).answers(asked(*texts), seed=6, **drawn)
    assert len({text for own in together for text in own}) > 6


def test_first_tokens_are_drawn_as_likely_as_the_model_says(base):
    ids = Encoder(base.tokenizer, 128).prompt_ids((Message("user", "Hi"),))
    with torch.no_grad():
        likely = (base.model(input_ids=torch.tensor([ids])).logits[0, -1].double() / 0.3).softmax(-1)
    count = 600
    found = local(base).answers(asked("Hi"), samples=count, temperature=0.3, max_new_tokens=1)[0]
    shares = collections.Counter(found)
    texts = collections.Counter()
    for token, share in enumerate(likely.tolist()):
        texts[base.tokenizer.decode([token], skip_special_tokens=True).strip()] += share
    whole = [
        (text, share) for text, share in texts.most_common() if text and "\ufffd" not in text
    ]  # halves of characters look alike
    assert whole[0][1] > 0.1
    for text, share in whole[:4]:
        assert shares[text] / count == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)


def test_nothing_is_asked_twice_and_a_kill_loses_nothing(base, tmp_path, monkeypatch):
    monkeypatch.setattr("selectune.inference.local.TOGETHER", 2)
    written = []
    plain = LocalResponder._write

    def killed(self, questions, prompts):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.extend(questions)
        return plain(self, questions, prompts)

    monkeypatch.setattr(LocalResponder, "_write", killed)
    texts = [f"What is {i}?" for i in range(6)]
    with pytest.raises(KeyboardInterrupt):
        local(base, tmp_path / "answers.sqlite").answers(asked(*texts, *texts), max_new_tokens=4)
    before, written[:] = set(written), []
    found = local(base, tmp_path / "answers.sqlite").answers(asked(*texts, *texts), max_new_tokens=4)
    assert len(before) == 4 and len(written) == 2 and not before & set(written)
    monkeypatch.undo()
    assert found[:6] == found[6:] == local(base).answers(asked(*texts), max_new_tokens=4)
    assert Question((), 0, 0.0, 4, 0).key("one") != Question((), 0, 0.0, 4, 0).key("another")


def test_another_local_model_answers_when_it_is_named(llama_folder, tiny_folders):
    pool = Pool([], lambda: load_base(llama_folder), lambda words: Encoder(words, 128), quiet=True)
    own = responder(Asking(), pool)
    other = responder(Asking(by_model=str(tiny_folders["qwen2"])), pool)
    assert own.base is pool.base and other.base.model.config.model_type == "qwen2"
    assert own.answers(asked("Hi"), max_new_tokens=6) != other.answers(asked("Hi"), max_new_tokens=6)


def test_every_setting_is_explained():
    assert all(map(of_attributes(Asking).get, Asking.model_fields))
