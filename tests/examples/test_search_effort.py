"""Difficulty as search effort: the faithful-if lines, with responders whose answers are known."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from selectune.cli import app
from selectune.data import Message, Record
from selectune.errors import UserError
from selectune.examples import search_effort
from selectune.examples.search_effort import DEPTHS, STEP, Node, Search, SearchEffort, _least_visited
from tests.examples.test_signals import pool


def record(question, answer):
    return Record("chat", (Message("user", question), Message("assistant", answer)))


RECORDS = [record(f"How much is {n} times two?", str(2 * n)) for n in range(8)]


class Scripted:
    """Answers by a function of the prompt, the seed and the sample; counts what it was asked."""

    def __init__(self, say):
        self.say, self.asked = say, []

    def answers(self, prompts, *, samples=1, temperature=0.0, max_new_tokens=256, seed=0):
        self.asked.append([prompt[-1].content for prompt in prompts])
        return [[self.say(prompt, seed, sample) for sample in range(samples)] for prompt in prompts]


def search(say, attempts=10, seed=0):
    return Search(Scripted(say), attempts, 0.5, 64, seed)


def number_of(prompt):
    return int(prompt[-1].content.split()[3])


def test_the_first_right_answer_counts_and_nobody_is_asked_after_it():
    """Record n answers rightly at its n-th try; 0 never does."""
    tries = {}

    def say(prompt, seed, sample):
        n = number_of(prompt)
        tries[n] = tries.get(n, 0) + 1
        return f"I think the answer is {2 * n}." if tries[n] == n else "The answer is -1."

    made = search(say)
    assert made.answers(RECORDS).tolist() == [11, 1, 2, 3, 4, 5, 6, 7]
    assert [len(asked) for asked in made.responder.asked] == [8, 7, 6, 5, 4, 3, 2, 1, 1, 1]


@pytest.mark.parametrize("how", ["answers", "tree"])
def test_without_chance_a_record_is_solved_at_once_or_never(how):
    made = search(lambda prompt, seed, sample: f"Answer: {2 * number_of(prompt)}" if number_of(prompt) % 2 else "Answer: -1")
    assert getattr(made, how)(RECORDS).tolist() == [11, 1] * 4


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("how", ["answers", "tree"])
def test_more_tries_never_make_a_solved_record_harder(how, seed):
    def say(prompt, seed, sample):
        draw = np.random.default_rng([seed, sample, *prompt[-1].content.encode()])
        return f"Answer: {2 * number_of(prompt) if draw.random() < 0.25 else -1}" if draw.random() < 0.6 else "We go on."

    few, many = (getattr(search(say, attempts, seed), how)(RECORDS) for attempts in (4, 16))
    solved = few <= 4
    assert solved.any() and not solved.all() and (many > 4)[~solved].all()
    assert np.array_equal(few[solved], many[solved])


def test_the_tree_is_searched_as_written_down():
    """Only the third branch below the second one is right: the search meets the branches in turn."""

    def say(prompt, seed, sample):
        text = prompt[-1].content
        assert prompt[0] == Message("system", STEP)
        if "Steps so far" not in text:
            return f"go {sample}"
        steps = text.partition("Steps so far:\n")[2].splitlines()
        if len(steps) == 1:
            return f"turn {sample}"
        return "Answer: 14" if steps[:2] == ["go 1", "turn 2"] else "Answer: 3"

    # each iteration's branch: go 0 | go 1, turn 0 | go 2, turn 0 | go 0, turn 0 | go 1, turn 1 | go 2, turn 1 | go 0, turn 1 | go 1, turn 2
    assert search(say, 20).tree(RECORDS[7:]).tolist() == [8]
    assert search(say, 7).tree(RECORDS[7:]).tolist() == [8]  # not solved within seven


@pytest.mark.parametrize("how", ["answers", "tree"])
def test_choices_are_shown_and_a_letter_names_one(how):
    asked = Record(
        "choice",
        (Message("user", "Which lamp is on?"), Message("assistant", "green")),
        choices=("red", "green"),
        answer=1,
    )
    made = search(lambda prompt, seed, sample: "Answer: B", 1)
    assert getattr(made, how)([asked]).tolist() == [1]
    assert made.responder.asked[0] == ["Which lamp is on?\nA. red\nB. green"]
    assert getattr(search(lambda prompt, seed, sample: "Answer: A", 1), how)([asked]).tolist() == [2]


@pytest.mark.parametrize("how", ["answers", "search"])
def test_raw_text_asks_nothing_and_is_refused(how, llama_folder, monkeypatch):
    with pytest.raises(UserError, match="this one has none"):
        choose(pool(llama_folder, [*RECORDS, Record("text", text="A lamp.")]), pytest.fail, monkeypatch, count=2, how=how)


def test_the_least_visited_branch_is_followed():
    root = Node(children=[Node(("a",), visits=2), Node(("b",), visits=1), Node(("c",), visits=1)])
    root.children[1].children = [Node(("b", "x"), visits=1), Node(("b", "y"))]
    assert _least_visited(root).steps == ("b", "y")


def test_a_solution_ends_with_its_answer_or_at_its_longest():
    lengths = []

    def say(prompt, seed, sample):
        steps = prompt[-1].content.partition("Steps so far:\n")[2].splitlines()
        lengths.append(len(steps))
        return "We go on.\nAnswer: 14"  # only the first line is a step

    assert search(say, 1).tree(RECORDS[7:]).tolist() == [2]
    assert max(lengths) == 9


def choose(made, say, monkeypatch, **values):
    monkeypatch.setattr(search_effort, "responder", lambda settings, pool: Scripted(say))
    return SearchEffort(**values).select(made)


def test_the_hardest_are_kept_and_the_unsolved_where_they_are_wanted(llama_folder, monkeypatch):
    def say(prompt, seed, sample):
        n = number_of(prompt)
        return str(2 * n) if seed // DEPTHS + 1 == n else "none"

    made = pool(llama_folder, RECORDS)
    first = choose(made, say, monkeypatch, count=3, attempts=6)  # records 0 and 7 are never solved
    assert set(first.places.tolist()) == {0, 7, 6} and first.places.tolist()[2] == 6
    assert first.signals["tries"].tolist() == [7, 1, 2, 3, 4, 5, 6, 7]
    last = choose(made, say, monkeypatch, count=3, attempts=6, unsolved="last")
    assert last.places.tolist() == [6, 5, 4] and not made.notes
    choose(made, lambda *_: "none", monkeypatch, count=3, attempts=2)
    assert "by chance" in made.notes[0]


def test_a_base_solves_its_own_records(tmp_path, llama_folder):
    lines = [{"question": f"What is fault {i}?", "answer": str(i)} for i in range(6)]
    file, out = tmp_path / "pool.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for how in ("answers", "search"):
        done = CliRunner().invoke(app, ["select", str(file), "-m", f"search_effort:how={how},attempts=2,answer_tokens=6", "--count", "3",
                                        "-o", str(out), "--base", str(llama_folder)])  # fmt: skip
        assert done.exit_code == 0, done.output
        assert len(out.read_text().splitlines()) == 3
