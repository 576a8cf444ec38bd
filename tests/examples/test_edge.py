"""EDGE: the effect of a guideline against the model's own losses."""

import numpy as np
import pytest
import torch

from selectune.data import Message, Record
from selectune.errors import UserError
from selectune.examples.edge import GuidelineEffect, GuidelineEffectiveness, guided
from selectune.examples.factors.store import measure
from tests.examples.test_signals import RECORDS, pool


def own_loss(made, record, turn):
    """The model's own loss of one answer of a conversation."""
    (piece,) = made.encoder.encode(record)
    runs, labels = -1, [-100]
    for before, label in zip([-100, *piece.labels[1:]], piece.labels[1:], strict=False):
        runs += before == -100 and label != -100
        labels.append(label if label != -100 and runs == turn else -100)
    with torch.no_grad():
        ids = torch.tensor([piece.input_ids])
        return float(made.base.model(input_ids=ids, labels=torch.tensor([labels]), use_cache=False).loss)


def test_no_guideline_has_no_effect_and_the_answer_itself_a_known_one(llama_folder):
    made = pool(llama_folder)
    assert np.array_equal(measure(made, GuidelineEffect(guideline="")), np.zeros(len(RECORDS)))
    guideline = "Lamps: red, green."
    found = measure(made, GuidelineEffect(guideline=guideline))
    for number in (0, 5):
        expected = own_loss(made, guided(RECORDS[number], ""), 0) - own_loss(made, guided(RECORDS[number], guideline), 0)
        assert found[number] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert guided(RECORDS[0], "").messages == RECORDS[0].messages


def test_only_answers_count_and_each_as_much_as_another(llama_folder):
    turns = (
        Message("user", "Which lamp?"),
        Message("assistant", "The red one is on."),
        Message("user", "Sure?"),
        Message("assistant", "yes"),
    )
    record, guideline = Record("chat", turns), "Lamps: red."
    made = pool(llama_folder, [record, *RECORDS[:2]])
    gains = [own_loss(made, guided(record, ""), turn) - own_loss(made, guided(record, guideline), turn) for turn in (0, 1)]
    assert measure(made, GuidelineEffect(guideline=guideline))[0] == pytest.approx(np.mean(gains), rel=1e-3, abs=1e-4)


def test_the_least_helped_are_kept_and_the_easiest_can_come_last(llama_folder, tmp_path):
    made = pool(llama_folder, target=RECORDS[:4])
    signals = GuidelineEffectiveness(count=3, guideline="Lamps: red.").score(made)
    chosen = GuidelineEffectiveness(count=3, guideline="Lamps: red.").select(made).places
    assert set(chosen.tolist()) == set(np.argsort(signals["guideline effectiveness"])[:3].tolist())
    easy = set(np.argsort(signals["loss"])[:5].tolist())
    for keep in ("lowest", "highest"):
        method = GuidelineEffectiveness(count=5, guideline="Lamps: red.", easiest=0.5, keep=keep)
        assert not easy & set(method.select(made).places.tolist())
    (tmp_path / "guide.txt").write_text("Lamps: red.")
    assert np.array_equal(GuidelineEffectiveness(guideline=str(tmp_path / "guide.txt")).score(made)["order"], signals["order"])
    assert RECORDS[0].question in "".join(GuidelineEffectiveness(examples=4).text(made))
    assert GuidelineEffectiveness(guideline="lamp " * 60).text(made) == "lamp " * 60  # too long for the name of a file
    (tmp_path / "guide.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="cannot be read"):
        GuidelineEffectiveness(count=2, guideline=str(tmp_path / "guide.txt")).select(made)
    with pytest.raises(UserError, match="no room"):
        GuidelineEffectiveness(count=2, guideline="lamp " * 400).select(made)
    with pytest.raises(UserError, match="no guideline"):
        GuidelineEffectiveness(count=2).select(pool(llama_folder))


def test_a_guideline_that_holds_the_answer_helps_and_others_do_not(llama_folder, monkeypatch):
    """Tokens of an answer that was told have a log-probability of -0.1, others of -2."""
    made = pool(llama_folder, RECORDS[:4])
    words = made.base.tokenizer

    def log_probabilities(self, pieces):
        found = []
        for piece in pieces:
            told = words.decode([token for token, label in zip(piece.input_ids, piece.labels, strict=True) if label == -100])
            said = words.decode([label for label in piece.labels if label != -100], skip_special_tokens=True).strip()
            found.append(np.full(sum(label != -100 for label in piece.labels[1:]), -0.1 if said in told else -2.0))
        return found

    monkeypatch.setattr(type(made.worker()), "log_probabilities", log_probabilities)
    found = measure(made, GuidelineEffect(guideline=RECORDS[2].response))
    assert found == pytest.approx([0, 0, 1.9, 0])


def test_a_file_that_is_not_there_is_no_guideline(llama_folder):
    with pytest.raises(UserError, match=r"rules\.txt.*no such file"):
        GuidelineEffectiveness(guideline="rules.txt").text(pool(llama_folder))
    for text in ("Think.", "Lamps are on. See rules.txt"):
        assert GuidelineEffectiveness(guideline=text).text(pool(llama_folder)) == text
