"""The built-in domain keeps its promises: reproducible, taught in full, asked in other words, not given away."""

import json
import re
from collections import Counter

import pytest
from typer.testing import CliRunner

from selectune import pipeline
from selectune.cli import app
from selectune.demo import build, files
from selectune.demo.phrasings import WORDINGS
from selectune.errors import UserError
from selectune.recipe import Recipe

GRAM = 8


def _read(name):
    return [json.loads(line) for line in files()[name].read_text(encoding="utf-8").splitlines()]


def _words(text):
    return re.findall(r"\w+", text.lower().replace("-", " "))


def _grams(text):
    words = _words(text)
    return {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


@pytest.fixture(scope="module")
def train():
    return _read("train.jsonl")


@pytest.fixture(scope="module")
def test():
    return _read("test.jsonl")


def test_files_are_as_built(tmp_path, monkeypatch, capsys):
    assert build.main(["--check"]) == 0
    there = {name: tmp_path / name for name in files()}
    monkeypatch.setattr(build, "files", lambda: there)
    assert build.main(["--check"]) == 1
    assert "differs" in capsys.readouterr().out
    assert build.main([]) == 0
    assert all(there[name].read_bytes() == path.read_bytes() for name, path in files().items())


def test_a_demonstration_may_be_shorter(tmp_path, monkeypatch):
    asked = []

    def stop(recipe, quiet):
        asked.append(Recipe(**recipe))
        raise UserError("enough")

    monkeypatch.setattr(pipeline, "specialize", stop)
    for given in ([], ["--minutes", "2.5"]):
        assert isinstance(CliRunner().invoke(app, ["demo", "--output", str(tmp_path), *given]).exception, UserError)
    assert [recipe.budget.minutes for recipe in asked] == [None, 2.5]
    assert asked[0] == asked[1].model_copy(update={"budget": asked[0].budget})


def test_sizes(train, test):
    assert 1000 <= len(train) <= 1600
    assert 200 <= len(test) <= 240
    assert all(path.stat().st_size < 700_000 for path in files().values())


def test_no_test_wording_is_trained(train, test):
    trained = {" ".join(_words(record["question"])) for record in train}
    asked = [" ".join(_words(record["question"])) for record in test]
    assert not trained & set(asked)
    assert len(set(asked)) == len(asked)


def test_no_eight_words_in_a_row_are_shared(train, test):
    """Neither with a training question nor with a training answer; names and values are shorter than eight words."""
    trained = set().union(*(_grams(record[field]) for record in train for field in ("question", "answer")))
    assert [record["question"] for record in test if _grams(record["question"]) & trained] == []


def test_templates_are_disjoint_and_differ_in_their_words():
    for kind, wording in WORDINGS.items():
        taught = wording.train
        for asked in wording.test:
            for template in taught:
                a, b = set(_words(asked)) - {"s", "a"}, set(_words(template)) - {"s", "a"}
                assert len(a & b) / len(a | b) < 0.5, (kind, asked, template)


def test_choices(test):
    for record in test:
        assert set(record) == {"question", "choices", "answer"}
        assert len(record["choices"]) == len(set(record["choices"])) == 4
        assert record["answer"] in record["choices"]
    positions = Counter(record["choices"].index(record["answer"]) for record in test)
    assert max(positions.values()) - min(positions.values()) <= 1


def test_wrong_choices_are_wrong():
    facts = build.all_facts()
    for fact, record in build.test_records(facts):
        values = {build._short(other) for other in facts if other.kind == fact.kind}
        assert record["answer"] == build._short(fact) and set(record["choices"]) <= values


def test_the_question_does_not_hold_its_answer(test):
    assert not [r for r in test if " ".join(_words(r["answer"])) in " ".join(_words(r["question"]))]


def test_every_tested_fact_is_taught(train):
    taught = {(record["question"], record["answer"]) for record in train}
    for fact, record in build.test_records(build.all_facts()):
        lessons = [(lesson["question"], lesson["answer"]) for lesson in build.training_records(fact)]
        assert set(lessons) <= taught
        assert len(lessons) >= 3 and {answer for _, answer in lessons} == {f"{record['answer']}."}


def test_facts_are_distinct_and_answers_short():
    facts = build.all_facts()
    assert 250 <= len(facts) <= 400
    assert len({(fact.kind, fact.subject) for fact in facts}) == len(facts)
    assert all(1 <= len(fact.value.split()) <= 8 for fact in facts)


def test_every_fact_is_in_the_manual():
    text = files()["manual.md"].read_text(encoding="utf-8").lower()
    for fact in build.all_facts():
        assert fact.value.lower() in text, fact
        assert fact.subject.lower() in text or fact.kind == "general"


def test_no_two_training_questions_are_equal(train):
    questions = Counter(" ".join(_words(record["question"])) for record in train)
    assert [question for question, count in questions.items() if count > 1] == []
