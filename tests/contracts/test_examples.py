"""The contract of every method that chooses examples.

Whatever the method: the budget is exact in records and filled but not exceeded in tokens; the choice is deterministic and follows the
records' content, not their order; duplicates, unicode, very long and very short records, pools of one record and pools smaller than the
clusters are handled, and a budget that makes no sense is refused in one line. A method is covered as soon as it is in the catalogue.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from selectune import catalogue
from selectune.data import Encoder, Message, Record
from selectune.errors import UserError
from selectune.examples import Pool
from selectune.examples.among_answers import AmongAnswers
from selectune.models import load_base

METHODS = catalogue.methods("examples")
SMALL = {
    "steps": 2,
    "clusters": 3,
    "dimension": 64,
    "rounds": 2,
    "checkpoints": 2,
    "neighbours": 2,
    "permutations": 5,
    "subject": "lamps",
    "longest": 8,
    "start": 6,
    "more": 4,
    "attempts": 2,
    "answer_tokens": 8,
}
"""Settings that make a tiny pool enough, for the methods that have them."""
OWN = {"data_whisperer": {"longest": 256}}
"""Where a setting of that name is another one: of a prompt, not of an answer."""


def record(question, answer):
    return Record("chat", (Message("user", question), Message("assistant", answer)))


RECORDS = [record(f"What is fault {i}?", "It means lamp " * (i % 4 + 1) + f"{i * 7} is on.") for i in range(14)] + [
    record("Wie heißt das? \u202e日本語 🙂", "Straße – naïve 👩‍👩‍👧"),
    record("Tell me everything.", "word " * 400),
    record("Say one word.", "yes"),
    record("What is fault 3?", "Nobody knows."),
]
TARGET = [record(f"Which lamp is on at fault {i}?", f"Lamp {i * 7}.") for i in range(4)]


def pool(folder, records=RECORDS, seed=0, target=TARGET):
    return Pool(records, lambda: load_base(folder), lambda words: Encoder(words, 128), target, seed, quiet=True)


def make(name, **values):
    known = METHODS[name].model_fields
    return catalogue.create(
        "examples", {"method": name} | {key: v for key, v in (SMALL | OWN.get(name, {}) | values).items() if key in known}
    )


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    """Sentences are embedded by their letters: the real encoder is tested where it belongs."""

    class Letters:
        def embed(self, texts):
            made = np.zeros((len(texts), 384), np.float32)
            for number, text in enumerate(texts):
                for place, letter in enumerate(text[:200]):
                    made[number, (ord(letter) * 31 + place % 7) % 384] += 1
            return made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-9)

    monkeypatch.setattr("selectune.models.sentence_encoder.sentence_encoder", lambda: Letters())


@pytest.mark.parametrize("name", METHODS)
def test_the_budget_is_exact_in_records_and_not_exceeded_in_tokens(name, llama_folder):
    made = pool(llama_folder)
    choice = make(name, count=5).select(made)
    assert len(choice.places) == 5 == len(set(choice.places.tolist()))
    assert all(0 <= place < len(made) for place in choice.places)
    assert all(len(values) == len(made) for values in choice.signals.values())
    by_tokens = make(name, count=60, by="tokens").select(made)
    made = made if by_tokens.records is None else made.of(by_tokens.records)
    used = int(made.tokens[by_tokens.places].sum())
    assert 0 < used <= 60 and len(set(by_tokens.places.tolist())) == len(by_tokens.places)
    left = [t for place, t in enumerate(made.tokens.tolist()) if place not in set(by_tokens.places.tolist())]
    if not issubclass(METHODS[name], AmongAnswers):
        assert min(left) > 60 - used  # no record that is left would still fit


@pytest.mark.parametrize("name", METHODS)
def test_a_base_in_bf16_chooses_too(name, llama_folder):
    """What it is trained to for a while is in fp32 where it learnt, and in bf16 elsewhere."""
    base = load_base(llama_folder, dtype=torch.bfloat16)
    made = replace(pool(llama_folder), load_base=lambda: base, bfloat16=True)
    assert len(set(make(name, count=5).select(made).places.tolist())) == 5


@pytest.mark.parametrize("name", METHODS)
def test_the_choice_is_deterministic_and_does_not_depend_on_the_order(name, llama_folder):
    first = make(name, count=5).select(pool(llama_folder))
    again = make(name, count=5).select(pool(llama_folder))
    assert first.places.tolist() == again.places.tolist()
    turned = make(name, count=5).select(pool(llama_folder, RECORDS[::-1]))
    assert {RECORDS[p].key for p in first.places} == {RECORDS[::-1][p].key for p in turned.places}


@pytest.mark.parametrize("name", METHODS)
def test_duplicates_and_small_pools_are_handled(name, llama_folder):
    doubled = [*RECORDS[:4], *RECORDS[:4]]
    choice = make(name, count=3).select(pool(llama_folder, doubled))
    assert len(set(choice.places.tolist())) == 3
    assert make(name).select(pool(llama_folder, RECORDS[:1])).places.tolist() == [0]
    assert len(make(name, count=1).select(pool(llama_folder, RECORDS[:2])).places) == 1


@pytest.mark.parametrize("name", METHODS)
def test_what_makes_no_sense_is_refused_in_one_line(name, llama_folder):
    for wrong in ({"count": 10**9}, {"count": 10**9, "by": "tokens"}):
        with pytest.raises(UserError, match=r"examples\.count"):
            make(name, **wrong).select(pool(llama_folder))
    with pytest.raises(UserError, match="no records"):
        make(name).select(pool(llama_folder, []))
    if METHODS[name].needs_target:
        with pytest.raises(UserError, match="target"):
            make(name, count=3).select(pool(llama_folder, target=[]))
    for wrong in ({"fraction": 0}, {"fraction": 1.5}, {"count": 0}, {"by": "pages"}):
        with pytest.raises(UserError):
            make(name, **wrong)


@pytest.mark.parametrize("method", ["deal_rec:count=2", "free_shap:count=2", "information_gain:count=2,gain=gradient"])
def test_a_pool_of_which_nothing_trains_is_refused_in_one_line(method, llama_folder):
    unread = [record("lamp " * 300, answer) for answer in ("on", "off", "neither")]
    with pytest.raises(UserError, match="none of the records has a response"):
        catalogue.create("examples", method).select(pool(llama_folder, unread))


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("sampled", "signals", []),
        ("instag", "scales", [8, 0]),
        ("rare_first", "scales", [0]),
        ("infinity_instruct", "scales", [-1]),
        ("free_shap", "ridge", 1e-12),
    ],
)
def test_values_with_which_nothing_can_be_done_are_refused_in_one_line(name, setting, value):
    with pytest.raises(UserError, match=rf"examples\.{setting}"):
        make(name, **{setting: value})
