"""RobustFT, SemiEvol and LLKD: the faithful-if lines of their cards, with an endpoint that knows what it should."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from selectune.data import Encoder, Message, Record
from selectune.errors import UserError
from selectune.examples import Pool
from selectune.examples.factors.asking import alike, answered, choice_of, final, question, same, solved
from selectune.examples.factors.likely_labels import OfLabels, entropy
from selectune.examples.factors.nearest import nearest
from selectune.examples.factors.signals import ResponseLoss
from selectune.examples.factors.store import measure
from selectune.examples.llkd import LearningWithLess, Thresholds, _most_given
from selectune.examples.robust_ft import DIRECT, REASONED, RobustFineTuning
from selectune.examples.semi_evol import SemiSupervised
from selectune.inference.local import LocalResponder
from selectune.models import load_base
from tests.contracts.test_examples import no_download  # noqa: F401
from tests.endpoint import Endpoint
from tests.examples.test_signals import own_loss


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTUNE_CACHE", str(tmp_path / "cache"))


def lamp(number):
    return f"lamp {number * 7}"


def record(number, answer=None):
    return Record("chat", (Message("user", f"What is on at fault {number}?"), Message("assistant", answer or lamp(number))))


RECORDS = [record(number) for number in range(10, 22)]
NOISY = [record(number, "a wrong thing" if number % 3 == 0 else None) for number in range(10, 22)]


def pool(folder, records, target=(), **options):
    return Pool(records, lambda: load_base(folder), lambda words: Encoder(words, 250), target, quiet=True, **options)


def asked_about(body):
    return int(re.findall(r"at fault (\d+)\?", body["messages"][-1]["content"])[-1])


def knows(body):
    """A model that knows every lamp."""
    return f"Let me see.\nAnswer: {lamp(asked_about(body))}"


def test_what_an_answer_says():
    plain = record(10)
    assert final("First.\nAnswer: no\nAnswer: **lamp 70** ") == "lamp 70" and final(" lamp 70 ") == "lamp 70"
    assert same(plain, "It is Lamp 70.", "lamp 70") and not same(plain, "lamp 7", "lamp 70") and not same(plain, "", "")
    choice = Record(
        "choice", (Message("user", "Which?"), Message("assistant", "red lamp")), choices=("red lamp", "lamp", "no"), answer=0
    )
    assert [choice_of(choice, text) for text in ("red lamp", "(B) lamp", "C", "It is no.", "red lamp or no", "?")] == [
        0,
        1,
        2,
        2,
        None,
        None,
    ]
    assert same(choice, "A", "red lamp") and not same(choice, "?", "?")
    changed = answered(choice, "B")
    assert (changed.response, changed.answer, changed.choices) == ("lamp", 1, choice.choices)
    assert answered(choice, "?") is None and answered(plain, " ") is None and answered(plain, "x").response == "x"


DIFFERENT = [("-5", "5"), ("5", "0.5"), ("3", "3.14"), ("12", "12,000"), ("x<5", "x>5"), ("3", "3/4"), ("-$5", "$5"),
             ("1.1.20", "1.10.20")]  # fmt: skip
EQUAL = [("12,000", "12000"), ("5.0", "5"), (".5", "0.50"), ("−7", "It is -7."), ("1,234.50", "$1234.5"), ("->", "->")]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_numbers_differ_by_sign_and_decimals(one, other):
    assert not same(record(10), one, other) and not same(record(10), other, one)
    assert same(record(10), f"It is {one}.", one) and same(record(10), other, f"so {other}, then")
    choice = Record("choice", (Message("user", "Which?"), Message("assistant", one)), choices=(one, other), answer=0)
    assert (choice_of(choice, one), choice_of(choice, f"It is {other}.")) == (0, 1)


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_a_number_is_the_same_however_it_is_written(one, other):
    assert same(record(10), one, other) and not same(record(10), one, "<-")


def test_answers_are_alike_where_each_agrees_with_every_other():
    plain, drawn = record(10), ["lamp", "lamp 7", "", "lamp 9", "It is lamp 9"]
    assert (
        alike(plain, drawn) == [[0, 1], [3, 4]] and alike(plain, drawn[:1] * 3) == [[0, 1, 2]] and alike(plain, ["", " "]) == []
    )
    text, share, unsure = _most_given(plain, ["lamp", "lamp 7", "lamp 9"])
    shares = np.array([2, 1]) / 3
    assert (text, share) == ("lamp", 2 / 3) and unsure == pytest.approx(-(shares * np.log(shares)).sum() / np.log(3))


def test_the_nearest_are_those_of_the_whole_matrix(monkeypatch):
    from selectune.examples.factors import nearest as module

    monkeypatch.setattr(module, "ENTRIES", 70)
    vectors = np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32).round(1)
    whole = vectors @ vectors.T
    places, found = nearest(vectors[:9], vectors, 4)
    assert np.array_equal(places, np.argsort(-whole[:9], axis=1, kind="stable")[:, :4])
    assert np.array_equal(found, np.take_along_axis(whole[:9], places, 1))
    np.fill_diagonal(whole, -np.inf)
    assert np.array_equal(nearest(vectors, vectors, 3, themselves=True)[0], np.argsort(-whole, axis=1, kind="stable")[:, :3])
    assert nearest(vectors[:2], vectors[:1], 3)[0].shape == (2, 1) and nearest(vectors[:1], vectors[:1], 3, True)[0].shape == (
        1,
        0,
    )


# -- RobustFT --------------------------------------------------------------------------------------------------------------


def test_records_that_the_model_agrees_with_stay_as_they_are(llama_folder):
    with Endpoint(knows) as there:
        choice = RobustFineTuning(by_endpoint=there.url, by_model="large", fraction=1.0).select(pool(llama_folder, RECORDS))
    assert list(choice.records) == RECORDS and choice.signals["agreed"].all() and sorted(choice.places) == list(range(12))
    assert len(there.asked) == 24  # two answers a record, none anew


def test_final_answers_are_compared_and_not_the_numbers_on_the_way(llama_folder):
    records = [record(n, f"At fault {n} there are {n} lamps, less 3.\n#### {n - 3:,}") for n in (1015, 1016)]
    with Endpoint(lambda body: f"Answer: {1012 if asked_about(body) == 1015 else 1016}") as there:
        method = RobustFineTuning(by_endpoint=there.url, by_model="large", fraction=1.0, sure=0.0)
        choice = method.select(pool(llama_folder, records))
    assert choice.signals["agreed"].tolist() == [1, 0]


def test_the_examples_beside_a_question_are_the_nearest_clean_ones(monkeypatch):
    records = [record(number) for number in range(5)]
    vectors = np.array([[1, 0], [0, 1], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    monkeypatch.setattr(RobustFineTuning, "embed", lambda self, pool: vectors)
    found = RobustFineTuning(neighbours=2)._examples(Pool(records, None, None), clean=[1, 3, 4], noisy=[0, 2])
    assert found == dict.fromkeys([0, 2], "\n\n".join(solved(records[place]) for place in (4, 3)))
    assert RobustFineTuning(neighbours=2)._examples(Pool(records, None, None), clean=[], noisy=[0]) == {0: ""}


def loss_beside(made, asked, wanted):
    """The base's own loss of what was said about a record beside clean neighbours, after all that was asked."""
    bodies = [body for body in asked if "answered well" in body["messages"][-1]["content"]]
    (body,) = [body for body in bodies if f"Question: {wanted.question}" in body["messages"][-1]["content"].split("same way")[1]]
    before = made.encoder.prompt_ids(tuple(Message(one["role"], one["content"]) for one in body["messages"]))
    said = made.encoder.response_ids(knows(body))
    before = before[len(said) - made.base.model.config.max_position_embeddings :]
    return own_loss(made.base, before + said, [-100] * len(before) + said)


@pytest.mark.parametrize("sure", [0.0, 0.5, 1.0])
def test_wrong_answers_are_found_and_the_surest_answered_anew(llama_folder, sure):
    made = pool(llama_folder, NOISY)
    with Endpoint(knows) as there:
        settings = {"by_endpoint": there.url, "by_model": "large", "neighbours": 4}  # more is asked than a record may be long
        choice = RobustFineTuning(sure=sure, fraction=1.0, **settings).select(made)
    wrong = [place for place, one in enumerate(NOISY) if one.response == "a wrong thing"]
    assert np.flatnonzero(choice.signals["agreed"] == 0).tolist() == wrong and len(there.asked) == 2 * 12 + 2 * len(wrong)
    changed = [place for place in wrong if choice.records[place] == RECORDS[place]]
    assert len(changed) == round(sure * len(wrong)) == sum(new != old for new, old in zip(choice.records, NOISY, strict=True))
    doubt = choice.signals["doubt"]
    assert doubt[wrong] == pytest.approx([loss_beside(made, there.asked, NOISY[place]) for place in wrong], rel=1e-4)
    assert not changed or max(doubt[changed]) <= min([doubt[place] for place in wrong if place not in changed], default=np.inf)
    clean, rest = set(range(12)) - set(wrong), [place for place in wrong if place not in changed]
    order = choice.places.tolist()
    assert set(order[: len(clean)]) == clean and set(order[len(clean) : len(clean) + len(changed)]) == set(changed)
    assert order[12 - len(rest) :] == sorted(rest, key=lambda place: doubt[place])


def test_what_the_base_does_not_know_comes_before_what_it_invents_and_after_what_another_model_says(llama_folder):
    settings = {"sure": 0.5, "fraction": 1.0, "longest": 6}
    for model in (None, str(llama_folder)):
        choice = RobustFineTuning(by_model=model, **settings).select(pool(llama_folder, NOISY))
        changed = [choice.records[place] != NOISY[place] for place in choice.places.tolist()]
        assert not choice.signals["agreed"].any() and 0 < sum(changed) <= 6
        assert changed == sorted(changed, reverse=model is not None)


def test_a_model_that_says_nothing_changes_nothing(llama_folder):
    with Endpoint(lambda body: "") as there:
        choice = RobustFineTuning(by_endpoint=there.url, by_model="large", fraction=1.0).select(pool(llama_folder, NOISY))
    assert list(choice.records) == NOISY and np.isposinf(choice.signals["doubt"]).all() and len(choice.places) == 12


def test_a_model_here_agrees_with_choices_that_are_its_likeliest(llama_folder):
    def asked(number):
        messages = (Message("user", f"What is on at fault {number}?"), Message("assistant", LABELS[number % 3]))
        return Record("choice", messages, choices=LABELS, answer=number % 3)

    made = pool(llama_folder, [asked(number) for number in range(9)])
    choice = RobustFineTuning(longest=6, fraction=1.0).select(made)
    for place, record in enumerate(made.records):
        best = []
        for form in (DIRECT, REASONED):
            before = made.encoder.prompt_ids((Message("user", form.format(question=question(record))),))
            said = [made.encoder.response_ids(label) for label in LABELS]
            losses = [len(ids) * own_loss(made.base, before + ids, [-100] * len(before) + ids) for ids in said]
            best.append(int(np.argmin(losses)))
        assert choice.signals["agreed"][place] == (best == [record.answer] * 2)
    assert 0 < choice.signals["agreed"].sum() < 9


def test_neighbours_are_clean_ones(llama_folder):
    with Endpoint(knows) as there:
        RobustFineTuning(by_endpoint=there.url, by_model="large", neighbours=2).select(pool(llama_folder, NOISY))
    beside = [body["messages"][-1]["content"] for body in there.asked if "answered well" in body["messages"][-1]["content"]]
    assert len(beside) == 4
    for text in beside:
        shown = re.findall(r"Question: What is on at fault (\d+)\?\nAnswer: (lamp \d+)\n", text)
        assert len(shown) == 2 and all(lamp(int(number)) == answer and int(number) % 3 for number, answer in shown)
        assert "wrong" not in text


def test_raw_text_is_refused(llama_folder):
    raw = [Record("text", text="The quick brown fox.", source="pool.jsonl", line=number + 1) for number in range(4)]
    for method in (RobustFineTuning(count=1), LearningWithLess(count=1)):
        with pytest.raises(UserError, match=r"pool\.jsonl:1.*asks the records' questions") as error:
            method.select(pool(llama_folder, raw))
        assert "\n" not in str(error.value)


# -- SemiEvol --------------------------------------------------------------------------------------------------------------

TARGET = [record(number) for number in range(40, 44)]


def test_equal_answers_are_kept_and_nothing_is_settled(llama_folder):
    with Endpoint(knows) as there:
        choice = SemiSupervised(by_endpoint=there.url, by_model="large", temperature=0, fraction=1.0, steps=0).select(
            pool(llama_folder, NOISY, TARGET)
        )
    assert choice.signals["agreed"].all() and list(choice.records) == RECORDS
    assert len(there.asked) == 12 and not any("differ" in body["messages"][-1]["content"] for body in there.asked)
    assert all("fault 4" in body["messages"][-1]["content"].split("Answer this one")[0] for body in there.asked)


def test_answers_that_agree_with_the_first_alone_are_settled(llama_folder):
    def vague(body):
        settled = "differ" in body["messages"][-1]["content"]
        return "Answer: " + ("lamp 9" if settled else ["lamp", "lamp 7", "lamp 9"][body["seed"]])

    settings = {"by_model": "large", "samples": 3, "fraction": 1.0, "steps": 0}
    with Endpoint(vague) as there:
        choice = SemiSupervised(by_endpoint=there.url, **settings).select(pool(llama_folder, RECORDS[:3], TARGET))
    assert not choice.signals["agreed"].any() and {one.response for one in choice.records} == {"lamp 9"}


def test_answers_that_differ_are_settled_and_kept_where_they_are_likely(llama_folder):
    def unsure(body):
        number = asked_about(body)
        if "differ" in body["messages"][-1]["content"] or number % 2:
            return f"Answer: {lamp(number)}"
        return f"Answer: lamp {body['seed']}"

    made = pool(llama_folder, NOISY, TARGET)
    for likely in (0.0, 0.5, 1.0):
        with Endpoint(unsure) as there:
            choice = SemiSupervised(by_endpoint=there.url, by_model="large", likely=likely, fraction=1.0, steps=0).select(made)
        assert np.array_equal(choice.signals["agreed"], [float(number % 2) for number in range(10, 22)])
        assert list(choice.records) == RECORDS
        doubt = choice.signals["doubt"]
        assert doubt == pytest.approx(measure(made, ResponseLoss(), RECORDS), rel=1e-4)  # no step: the base's own
        order, split = choice.places.tolist(), [place for place in range(12) if (place + 10) % 2 == 0]
        assert set(order[:6]) == set(range(12)) - set(split) and order[6:] == sorted(split, key=lambda place: doubt[place])
        assert sum("settled" in told for told in choice.reasons.values()) == round(likely * 6)
    listed = next(body["messages"][-1]["content"] for body in there.asked if "differ" in body["messages"][-1]["content"])
    assert re.search(r"1\. lamp 0\n2\. lamp 1\n3\. lamp 2\n4\. lamp 3", listed)


def test_a_question_that_comes_again_with_its_answer_comes_last(llama_folder):
    again = [record(10, "lamp 5"), record(10, "lamp 6"), record(11), record(12)]
    made = pool(llama_folder, again, TARGET)
    with Endpoint(knows) as there:
        choice = SemiSupervised(by_endpoint=there.url, by_model="large", temperature=0, fraction=1.0, steps=0).select(made)
    assert set(choice.places[:3]) >= {2, 3} and choice.places[3] in (0, 1)
    assert any("1 questions repeat another" in note for note in made.notes)


def test_the_budget_is_of_the_pool_as_it_was_and_filled_with_what_trains(llama_folder):
    made = pool(llama_folder, [record(number, "lamp " * 12 + str(number)) for number in range(10, 22)], TARGET)
    whole = int(made.tokens.sum())
    for budget in (whole - 1, whole // 4):
        with Endpoint(knows) as there:
            method = SemiSupervised(by_endpoint=there.url, by_model="large", temperature=0, by="tokens", count=budget, steps=0)
            choice = method.select(made)
        sizes = made.of(choice.records).tokens
        used, left = int(sizes[choice.places].sum()), sorted(set(range(12)) - set(choice.places.tolist()))
        assert used < whole and used <= budget and all(used + sizes[place] > budget for place in left)


def test_the_base_that_has_learnt_the_target_answers(llama_folder):
    made = pool(llama_folder, RECORDS[:4], TARGET)
    settings = {"count": 2, "longest": 6, "samples": 2, "temperature": 0}
    untaught, taught = (SemiSupervised(steps=steps, learning_rate=3e-3, **settings).select(made).records for steps in (0, 40))
    assert [one.response for one in untaught] != [one.response for one in taught]


# -- LLKD ------------------------------------------------------------------------------------------------------------------


def test_without_momentum_and_labels_thresholds_are_the_batchs_means():
    draw = np.random.default_rng(0)
    thresholds = Thresholds(momentum=0.0)
    for _ in range(3):
        sure, unsure = draw.random(16), draw.random(16)
        assert np.array_equal(thresholds.passes(sure, unsure, [""] * 16), (sure >= sure.mean()) & (unsure >= unsure.mean()))


def test_thresholds_follow_batches_and_labels():
    draw = np.random.default_rng(1)
    thresholds, momentum = Thresholds(momentum=0.8), 0.8
    means: list[float] = []
    by_label: list[dict[str, float]] = [{}, {}]
    for turn in range(5):
        labels = draw.choice(["a", "b", "c"], 20).tolist()
        values = [draw.random(20), draw.random(20)]
        kept = thresholds.passes(*values, labels)
        for which in (0, 1):
            mean = float(values[which].mean())
            means[which : which + 1] = [mean if not turn else momentum * means[which] + (1 - momentum) * mean]
            for label in set(labels):
                own = float(np.mean([v for v, one in zip(values[which], labels, strict=True) if one == label]))
                by_label[which][label] = momentum * by_label[which].get(label, own) + (1 - momentum) * own
        limits = [
            {label: means[which] * mean / max(by_label[which].values()) for label, mean in by_label[which].items()}
            for which in (0, 1)
        ]
        assert kept.tolist() == [s >= limits[0][one] and u >= limits[1][one] for s, u, one in zip(*values, labels, strict=True)]
        surest = max(by_label[0], key=by_label[0].get)
        assert limits[0][surest] == pytest.approx(thresholds.means[0])


LABELS = ("a", "e", "of")


def sorted_by(number, label):
    messages = (Message("user", f"Which colour has fault {number}?"), Message("assistant", LABELS[label]))
    return Record("classification", messages, choices=LABELS, answer=label)


def test_a_labels_probability_is_that_of_its_words(llama_folder):
    made = pool(llama_folder, [sorted_by(3, 0), record(10)])
    found = measure(made, OfLabels())
    totals = []
    for label in range(3):
        (piece,) = made.encoder.encode(sorted_by(3, label))
        words = len(made.encoder.response_ids(LABELS[label]))
        totals.append(float(made.worker().log_probabilities([piece])[0][:words].sum()))
    shares = np.exp(totals) / np.exp(totals).sum()
    unsure = -(shares * np.log(shares)).sum() / np.log(3)
    assert found[0] == pytest.approx([shares.argmax(), shares.max(), unsure], rel=1e-4) and np.isnan(found[1]).all()


def test_all_labels_are_asked_after_the_same_prompt():
    pieces = []
    encoder = SimpleNamespace(
        max_length=12, prompt_ids=lambda messages: list(range(20)), response_ids=lambda choice: [100] * len(choice)
    )
    worker = SimpleNamespace(encoder=encoder, log_probabilities=lambda some: pieces.extend(some) or [np.zeros(1)] * len(some))
    for choices, room in ((("aaaa", "b", "ccccc"), 7), (("aaaa", "b", "c" * 30), 6)):
        pieces.clear()
        asked = Record("choice", (Message("user", "Which?"), Message("assistant", "b")), choices=choices, answer=1)
        OfLabels().measure(worker, [asked])
        assert [piece.input_ids.index(100) for piece in pieces] == [room] * 3
        assert all(piece.input_ids[:room] == list(range(20 - room, 20)) for piece in pieces)
        assert [len(piece.input_ids) - room for piece in pieces] == [4, 1, min(len(choices[2]), 6)]


def test_entropy_is_none_where_one_is_sure_and_greatest_where_nothing_is_known():
    assert entropy(np.array([1.0, 0.0])) == entropy(np.array([1.0])) == 0
    assert entropy(np.full(7, 1 / 7)) == pytest.approx(1)
    assert entropy(np.array([0.9, 0.1])) < entropy(np.array([0.6, 0.4])) < 1
    drawn = ["lamp 1", "lamp 1", "lamp 2", "lamp 3"]
    shares = np.array([0.5, 0.25, 0.25])
    text, share, unsure = _most_given(record(10), drawn)
    assert (text, share) == ("lamp 1", 0.5) and unsure == pytest.approx(-(shares * np.log(shares)).sum() / np.log(4))
    assert _most_given(record(10), ["", ""]) == ("", 0.0, 1.0) and _most_given(record(10), ["a", "a"])[1:] == (1.0, 0.0)


def test_what_the_teacher_is_sure_of_and_the_student_is_not_comes_first(llama_folder):
    records = [sorted_by(number, 0) for number in range(12)]

    def teacher(body):
        number = int(re.findall(r"fault (\d+)", body["messages"][-1]["content"])[-1])
        return LABELS[1] if number % 2 else LABELS[body["seed"] % 3]

    made = pool(llama_folder, records)
    with Endpoint(teacher) as there:
        choice = LearningWithLess(by_endpoint=there.url, by_model="large", samples=3, momentum=0, rounds=1, count=4).select(made)
    sure = choice.signals["teacher's confidence"]
    assert np.array_equal(sure, [1.0 if number % 2 else 1 / 3 for number in range(12)])
    assert all(choice.records[place].response == LABELS[1] for place in range(1, 12, 2))
    unsure = choice.signals["student's uncertainty"]
    assert unsure == pytest.approx(measure(made, OfLabels())[:, 2].astype(np.float64), abs=1e-5)
    assert choice.signals["weight"] == pytest.approx(sure * unsure)
    weight, passed = choice.signals["weight"], choice.signals["kept"] > 0
    assert 0 < passed.sum() < 12 and unsure.max() > 0.05
    assert np.array_equal(passed[choice.places], sorted(passed[choice.places], reverse=True))
    first = [place for place in choice.places.tolist() if passed[place]]
    assert weight[first].tolist() == sorted(weight[passed], reverse=True)[: len(first)]
    assert choice.weights == pytest.approx(
        choice.signals["weight"][choice.places] / choice.signals["weight"][choice.places].mean()
    )


@pytest.mark.parametrize("closed", [True, False])
def test_thresholds_follow_labels_only_where_all_records_have_the_same_choices(llama_folder, closed):
    def asked(number):
        own = LABELS if closed else tuple(f"{label} {number}" for label in LABELS)
        return Record("choice", (Message("user", f"Fault {number}?"), Message("assistant", own[0])), choices=own, answer=0)

    choice = LearningWithLess(momentum=0, rounds=1, batch=12, count=4).select(pool(llama_folder, [asked(n) for n in range(12)]))
    sure, unsure = choice.signals["teacher's confidence"], choice.signals["student's uncertainty"]
    labels = [record.response if closed else "" for record in choice.records]
    kept = Thresholds(momentum=0).passes(sure, unsure, labels)
    assert np.array_equal(choice.signals["kept"] > 0, kept) and 0 < kept.sum() < 12


def test_the_student_learns_between_rounds(llama_folder):
    records = [sorted_by(number, number % 3) for number in range(12)]

    def unsure(rounds, teacher):
        with Endpoint(teacher) as there:
            settings = {
                "by_endpoint": there.url,
                "by_model": str(teacher),
                "samples": 2,
                "momentum": 0.5,
                "steps": 20,
                "learning_rate": 3e-3,
            }
            return LearningWithLess(rounds=rounds, count=3, **settings).select(pool(llama_folder, records))

    once, twice = (unsure(rounds, lambda body: LABELS[0]).signals["student's uncertainty"] for rounds in (1, 2))
    assert np.isclose(once, twice, atol=1e-6).sum() == 6  # the first part is asked before anything is learnt
    silent = unsure(2, lambda body: "")
    assert silent.signals["kept"].sum() == 0 and list(silent.records) == records


def test_what_the_student_said_is_not_asked_again(llama_folder, tmp_path, monkeypatch):
    written = []
    write = LocalResponder._write
    monkeypatch.setattr(
        LocalResponder, "_write", lambda self, some, prompts: written.append(len(some)) or write(self, some, prompts)
    )
    choices = []
    with Endpoint(lambda body: knows(body) if body["seed"] % 2 else "Answer: none") as there:
        for count in (3, 3, 5):  # another budget asks nothing new either
            method = LearningWithLess(by_endpoint=there.url, by_model="large", samples=2, steps=2, longest=4, count=count)
            choices.append(method.select(replace(pool(llama_folder, RECORDS), folder=tmp_path)))
            assert sum(written) == 2 * len(RECORDS)
    assert all(
        np.array_equal(choices[0].signals["student's uncertainty"], one.signals["student's uncertainty"]) for one in choices
    )


def test_a_teacher_at_an_endpoint_sees_the_choices(llama_folder):
    def asked(number):
        messages = (Message("user", f"Which lamp is on at fault {number}?"), Message("assistant", "red"))
        return Record("choice", messages, choices=("red", "green", "blue"), answer=0)

    with Endpoint(lambda body: "B") as there:
        method = LearningWithLess(by_endpoint=there.url, by_model="large", samples=2, rounds=1, count=3, shots=1)
        choice = method.select(pool(llama_folder, [asked(number) for number in range(6)], [asked(7)]))
    assert all("A. red\nB. green\nC. blue" in message["content"] for body in there.asked for message in body["messages"][::2])
    assert all(one.response == "green" for one in choice.records) and (choice.signals["teacher's confidence"] == 1).all()


def test_thresholds_that_all_pass_and_equal_weights_are_plain_training_on_the_answers(llama_folder, monkeypatch):
    monkeypatch.setattr(Thresholds, "passes", lambda self, sure, unsure, labels: np.ones(len(labels), dtype=bool))
    monkeypatch.setattr(LearningWithLess, "_student", lambda self, pool, model, records: np.full(len(records), 0.5))
    records = [sorted_by(number, number % 3) for number in range(6)]
    with Endpoint(lambda body: LABELS[0]) as there:
        method = LearningWithLess(by_endpoint=there.url, by_model="large", samples=2, rounds=1, fraction=1.0, steps=1)
        choice = method.select(pool(llama_folder, records))
    assert choice.weights.tolist() == [1.0] * 6
    trained = choice.as_they_train(records)
    assert all(one.weight == 1 and one.response == LABELS[0] for one in trained.values()) and len(trained) == 6


def test_the_best_quarter_is_that_of_each_part_in_which_nothing_passes(llama_folder, monkeypatch):
    parts = iter([True, False])
    monkeypatch.setattr(Thresholds, "passes", lambda self, sure, unsure, labels: np.full(len(labels), next(parts)))
    monkeypatch.setattr(LearningWithLess, "_student", lambda self, pool, model, records: np.full(len(records), 0.5))
    records = [sorted_by(number, number % 3) for number in range(16)]
    choice = LearningWithLess(rounds=2, batch=8, count=3, steps=1).select(pool(llama_folder, records))
    assert choice.signals["kept"].sum() == 8 + 2


def test_where_nothing_passes_the_best_quarter_is_learnt(llama_folder, monkeypatch):
    monkeypatch.setattr(Thresholds, "passes", lambda self, sure, unsure, labels: np.zeros(len(labels), dtype=bool))
    records = [sorted_by(number, number % 3) for number in range(8)]
    choice = LearningWithLess(rounds=1, batch=8, momentum=0, count=3).select(pool(llama_folder, records))
    best = np.argsort(-choice.signals["weight"], kind="stable")[:2]
    assert set(np.flatnonzero(choice.signals["kept"])) == set(best)
