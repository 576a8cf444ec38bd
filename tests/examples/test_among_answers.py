"""Self-aligned perplexity and TATA: the faithful-if lines of their cards."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from selectune.data import Message, Record
from selectune.data.chat import Encoded
from selectune.errors import UserError
from selectune.examples import aptitude
from selectune.examples.among_answers import by_question, one_each
from selectune.examples.aptitude import Aptitude, OneShot, typical_of
from selectune.examples.factors.learnt import trained_copy
from selectune.examples.factors.shown import after_shot
from selectune.examples.factors.signals import ResponseLoss
from selectune.examples.factors.store import measure
from selectune.examples.self_aligned import SelfAligned, SelfAlignedPerplexity, of_strategies
from tests.examples.test_signals import pool
from tests.examples.words import words  # noqa: F401

pytestmark = pytest.mark.usefixtures("words")


def record(question, answer, source=""):
    return Record("chat", (Message("user", question), Message("assistant", answer)), source=source)


LAMPS = [
    record(f"What is fault {i}?", answer)
    for i in range(6)
    for answer in (f"Fault {i} means that lamp {i * 7} is on.", f"zq xv {i} kk wj {i}", f"Lamp {i * 7}.")
]


def by_hand(made, piece):
    """Perplexity of a piece's labels, by the model's own loss."""
    labels = torch.tensor([piece.labels])
    labels[0, 0] = -100
    with torch.no_grad():
        return float(made.base.model(input_ids=torch.tensor([piece.input_ids]), labels=labels).loss.exp())


def test_without_examples_it_is_plain_perplexity(llama_folder):
    made = pool(llama_folder, LAMPS)
    found = measure(made, SelfAlignedPerplexity())
    assert np.allclose(found, np.exp(measure(made, ResponseLoss())), rtol=1e-4)
    assert SelfAligned(pairs=0).shots(made) == ()
    chosen = SelfAligned(pairs=0).select(made).places.tolist()
    assert sorted(chosen) == sorted(min(range(i, i + 3), key=lambda place: found[place]) for i in range(0, 18, 3))
    assert chosen == sorted(chosen, key=lambda place: found[place])


def test_behind_examples_it_is_the_mean_over_those_of_other_questions(llama_folder):
    made = pool(llama_folder, LAMPS)
    shots = (("What is fault 0?", "Lamp red."), ("Who?", "Fault 17."), ("Where is lamp 3?", "Over the lazy dog."))
    found = measure(made, SelfAlignedPerplexity(shots=shots, count=2))
    for place, used in ((0, shots[1:]), (4, shots[:2])):
        pieces = [after_shot(made.encoder, shot, LAMPS[place], 256) for shot in used]
        assert found[place] == pytest.approx(np.mean([by_hand(made, piece) for piece in pieces]), rel=1e-4)


def test_the_example_comes_before_and_is_not_scored(llama_folder):
    made = pool(llama_folder, LAMPS)
    system = Record("chat", (Message("system", "Be brief."), *LAMPS[0].messages))
    for one in (LAMPS[0], system):
        piece = after_shot(made.encoder, ("Who?", "Fault 17."), one, 256)
        (own,) = made.encoder.encode(one)
        assert [label for label in piece.labels if label != -100] == [label for label in own.labels if label != -100]
        (whole,) = made.encoder.encode(
            Record("chat", (*one.messages[:-2], Message("user", "Who?"), Message("assistant", "Fault 17."), *one.messages[-2:]))
        )
        assert piece.input_ids == whole.input_ids
    assert after_shot(made.encoder, ("Who?", "Fault 17."), LAMPS[0], 20) is None
    assert after_shot(made.encoder, ("Who?", "Fault 17."), Record("text", text="Fault."), 256) is None


def test_the_bases_own_answers_are_shown_and_are_familiar(llama_folder):
    made = pool(llama_folder, LAMPS)
    method = SelfAligned(pairs=2, max_new_tokens=12)
    shots = method.shots(made)
    assert len(shots) == 3 and all(question.startswith("What is fault") and answer.strip() for question, answer in shots)
    terse = [one for one in LAMPS if one.response.startswith("Lamp")]
    made.base.model = trained_copy(made, 60, 1e-2, terse)
    shots = method.shots(made)
    own = [record(question, answer) for question, answer in shots]
    shuffled = [record(question, " ".join(reversed(answer.split()))) for question, answer in shots]
    assert all(one.response.startswith("Lamp") for one in own)
    found = measure(made, SelfAlignedPerplexity(shots=shots, count=2), own + shuffled)
    assert (found[: len(own)] < found[len(own) :]).all()


def test_a_strategy_is_chosen_for_all_whatever_their_order(llama_folder):
    files = [replace(one, source=("terse.jsonl", "noise.jsonl", "long.jsonl")[i % 3]) for i, one in enumerate(LAMPS)]
    made = pool(llama_folder, files)
    perplexity = measure(made, SelfAlignedPerplexity())
    means = [perplexity[start::3].mean() for start in range(3)]
    chosen = SelfAligned(pairs=0, per="strategy").select(made).places.tolist()
    assert sorted(chosen) == list(range(int(np.argmin(means)), 18, 3))
    turned = pool(llama_folder, files[::-1])
    assert {files[::-1][p].key for p in SelfAligned(pairs=0, per="strategy").select(turned).places} == {
        files[p].key for p in chosen
    }
    best = int(np.argmin(means))
    fewer = pool(llama_folder, [one for place, one in enumerate(files) if place != best])  # question 0 lacks the best strategy
    left = SelfAligned(pairs=0, per="strategy").select(fewer).places.tolist()
    assert len(left) == 6 and sum(fewer.records[p].source == files[best].source for p in left) == 5
    assert np.isnan(perplexity).sum() == 0 and len(set(of_strategies(made, perplexity).astype(int).tolist())) == 3


def test_of_equal_fit_the_shorter_answer_is_taken_and_other_choices_are_another_question(llama_folder):
    two = [record("Which?", "lamp lamp lamp"), record("Which?", "lamp")]
    for records in (two, two[::-1]):
        (place,) = one_each(pool(llama_folder, records), np.zeros(2))
        assert records[place].response == "lamp"

    def asked(*choices):
        messages = (Message("user", "Which of these is true?"), Message("assistant", choices[0]))
        return Record("choice", messages, choices=choices, answer=0)

    apart = pool(llama_folder, [asked("red", "green"), asked("on", "off"), two[0]])
    assert len(by_question(apart)) == 3 and len(one_each(apart, np.zeros(3))) == 3


def test_more_than_suits_is_told(llama_folder):
    made = pool(llama_folder, LAMPS)
    assert len(SelfAligned(pairs=0, count=12).select(made).places) == 6
    assert made.notes == ["12 records are asked for; only 6 answers suit the base"]
    with pytest.raises(UserError, match="one file"):
        SelfAligned(pairs=0, per="strategy").select(made)


STYLES = [
    record(f"What is {a} plus {a + 1}?", answer)
    for a in range(8)
    for answer in (f"```python\nprint({a} + {a + 1})\n```", f"It is the sum of both, {2 * a + 1}.")
]


def test_one_shot_likelihood_is_that_of_a_plain_loop_and_no_question_is_its_own_anchor(llama_folder):
    made = pool(llama_folder, STYLES)
    anchors = (record("What is 0 plus 1?", "1"), record("Which lamp is on?", "Fault 17."))
    found = measure(made, OneShot(anchors=anchors))
    for place, used in ((0, anchors[1:]), (3, anchors)):
        sums = []
        for anchor in used:
            piece = after_shot(made.encoder, (STYLES[place].question, STYLES[place].response), anchor, 256)
            count = sum(label != -100 for label in piece.labels)
            sums.append(-count * float(np.log(by_hand(made, piece))))
        assert found[place] == pytest.approx(np.mean(sums), rel=1e-3)


def test_accuracy_is_that_of_greedy_answers(monkeypatch, llama_folder):
    made = pool(llama_folder, STYLES)
    ids = made.encoder.prompt_ids((*STYLES[0].messages, Message("user", "Which lamp is on?")))
    prompt = len(ids)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(made.base.model(torch.tensor([ids])).logits[0, -1].argmax()))
    wrong = [*ids[:-3], ids[-3] + 1, *ids[-2:]]
    pieces = {"right": ids, "wrong": wrong}
    monkeypatch.setattr(
        aptitude, "after_shot",
        lambda encoder, shot, one, longest: Encoded(pieces[one.response], [-100] * prompt + pieces[one.response][prompt:]),
    )  # fmt: skip
    anchors = (record("a?", "right"), record("b?", "wrong"), record("c?", "right"), record("d?", "wrong"))
    assert measure(made, OneShot(anchors=anchors, right=True), [STYLES[0]]).tolist() == [0.5]
    assert measure(made, OneShot(anchors=anchors[::2], right=True), [STYLES[0]]).tolist() == [1.0]


def decide(monkeypatch, differences, **settings):
    """Choose with given differences of the questions."""
    monkeypatch.setattr(Aptitude, "differences", lambda self, pool, paired, first: np.array(differences, dtype=np.float64))

    def choose(folder, records=STYLES):
        made = pool(folder, records)
        places = Aptitude(**settings).select(made).places.tolist()
        kept = {}
        for place in places:
            kept.setdefault(made.records[place].question, set()).add("```" in made.records[place].response)
        return [kept.get(f"What is {a} plus {a + 1}?", set()) for a in range(8)], made

    return choose


def by_content(values):
    """Differences in the order in which the questions come: by content of their first answer."""
    order = []
    for one in sorted(STYLES, key=lambda one: one.key):
        if one.question not in order:
            order.append(one.question)
    return [values[int(question.split()[2])] for question in order]


def test_what_helps_more_is_kept_and_both_in_between(monkeypatch, llama_folder):
    values = [5.0, -5.0, 4.0, -4.0, 0.1, -0.1, 3.0, -3.0]
    kept, _ = decide(monkeypatch, by_content(values), lower=0.25, upper=0.75)(llama_folder)
    assert kept == [{True}, {False}, {True}, {False}, {True, False}, {True, False}, {True, False}, {True, False}]
    kept, _ = decide(monkeypatch, by_content(values), lower=0.5, upper=0.5)(llama_folder)
    assert kept == [{value > 0} for value in values]  # one style each
    kept, _ = decide(monkeypatch, [0.0] * 8)(llama_folder)
    assert kept == [{True, False}] * 8  # no difference: both
    choose = decide(monkeypatch, by_content(values), lower=0.5, upper=0.5, count=2)
    assert [len(one) for one in choose(llama_folder)[0]] == [1, 1, 0, 0, 0, 0, 0, 0]  # the clearest first


def test_an_odd_one_that_lies_at_the_quantile_keeps_both(monkeypatch, llama_folder):
    values = [5.0, -5.0, 4.0, -4.0, 0.5, -3.0, 3.0, 9.0]
    kept, _ = decide(monkeypatch, by_content(values), lower=0.5, upper=0.5)(llama_folder)
    assert kept == [{value > 1.75} for value in values]  # an even number: the quantile is none of them
    seven = [one for one in STYLES if one.question != "What is 7 plus 8?"]
    given = [value for value in by_content(values) if value != 9.0]
    kept, _ = decide(monkeypatch, given, lower=0.5, upper=0.5)(llama_folder, seven)
    assert kept == [{True}, {False}, {True}, {False}, {True, False}, {False}, {True}, set()]


def test_what_could_not_be_measured_keeps_both_and_moves_no_quantile(monkeypatch, llama_folder):
    values = [2.0, 3.0, 4.0, 5.0, np.nan, 6.0, 7.0, 8.0]
    kept, _ = decide(monkeypatch, by_content(values), lower=0.4, upper=0.6)(llama_folder)
    low, high = np.nanquantile(values, [0.4, 0.6])
    assert kept == [{True, False} if not (value < low or value > high) else {bool(value > high)} for value in values]
    assert kept[4] == {True, False}
    kept, _ = decide(monkeypatch, [np.nan] * 8)(llama_folder)
    assert kept == [{True, False}] * 8


def test_the_difference_is_the_first_styles_less_the_others_and_the_clusters(monkeypatch, llama_folder):
    plain = aptitude.measure
    worth = {one.key: int(one.question.split()[2]) * ("```" in one.response) for one in STYLES}

    def measured(pool, signal, records=None):
        if isinstance(signal, OneShot):
            return np.array([worth[one.key] for one in records], dtype=np.float64)
        return plain(pool, signal, records)

    monkeypatch.setattr(aptitude, "measure", measured)
    made = pool(llama_folder, STYLES)
    difference = Aptitude(measured=8).select(made).signals["difference"]
    assert difference.tolist() == [int(one.question.split()[2]) for one in STYLES]
    few = Aptitude(measured=2).select(made).signals["difference"]
    assert 1 <= len(set(few.tolist())) <= 2 and set(few.tolist()) <= set(range(8))


def test_each_source_has_quantiles_of_its_own(monkeypatch, llama_folder):
    easy = {f"What is {a} plus {a + 1}?" for a in range(4)}
    records = [replace(one, source="easy" if one.question in easy else "hard") for one in STYLES]
    values = [5.0, 6.0, 7.0, 8.0, -5.0, -6.0, -7.0, -8.0]  # the first style suits all of one source
    kept, _ = decide(monkeypatch, by_content(values), lower=0.5, upper=0.5)(llama_folder, records)
    assert kept == [{False}, {False}, {True}, {True}, {True}, {True}, {False}, {False}]
    kept, _ = decide(monkeypatch, by_content(values), lower=0.5, upper=0.5)(llama_folder)
    assert kept == [{True}] * 4 + [{False}] * 4


def test_equal_answers_make_no_difference(llama_folder):
    made = pool(llama_folder, [record(f"What is {a}?", "lamp " * (1 + n)) for a in range(3) for n in range(2)])
    same = [made.records[0], replace(made.records[0], line=7)]
    signal = OneShot(anchors=(record("Who?", "Fault 17."),))
    assert np.ptp(measure(made, signal, same)) == 0
    alike = Aptitude(style="longest", anchors=2, measured=2)
    choice = alike.select(made)
    assert len(choice.signals["difference"]) == 6 and np.isfinite(choice.signals["difference"]).all()
    first = alike.in_first_style(made, [[0, 1], [2, 3], [4, 5]])
    assert first.tolist() == [False, True] * 3


def test_pools_without_both_styles_are_kept_whole_and_told(llama_folder):
    made = pool(llama_folder, STYLES[1::2])
    assert sorted(Aptitude().select(made).places.tolist()) == list(range(8))
    assert "no question has answers in both styles" in made.notes[0]
    with pytest.raises(UserError, match=r"examples\.lower"):
        Aptitude(lower=0.7, upper=0.3).select(made)


def test_the_most_typical_are_nearest_to_their_centres():
    points = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.4]], dtype=np.float32)
    places, labels = typical_of(points, 2, 0)
    assert sorted(places) == [1, 4]
    assert all(labels[i] == labels[j] for i, j in ((0, 1), (1, 2), (3, 4), (4, 5))) and labels[0] != labels[3]
    assert points[places][labels].ravel().tolist() == pytest.approx([0.1] * 3 + [5.1] * 3)
    assert typical_of(points, 9, 0)[0] == list(range(6))


def test_anchors_are_the_targets_or_the_pools_shortest_answers(llama_folder):
    made = pool(llama_folder, STYLES)
    assert all("```" not in one.response or len(one.response) < 40 for one in Aptitude(anchors=4).chosen_anchors(made))
    assert len(Aptitude(anchors=4).chosen_anchors(made)) == 4
    shortest = {one.question: min((len(o.response), o.key) for o in STYLES if o.question == one.question) for one in STYLES}
    assert all((len(one.response), one.key) == shortest[one.question] for one in Aptitude(anchors=8).chosen_anchors(made))
    toward = pool(llama_folder, STYLES)
    toward.target = [record("Who?", "Fault 17."), record("Who?", "Fault 17 or 18.")]
    assert [one.response for one in Aptitude().chosen_anchors(toward)] == ["Fault 17."]
