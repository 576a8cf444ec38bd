"""MASS: the faithful-if lines of its card."""

import numpy as np
import pytest

from selectune import catalogue
from selectune.data import Message, Record
from selectune.errors import UserError
from selectune.examples.skill_graph import SkillGraph, graph, has, listed, merged, score, telling_phrases
from tests.examples.test_signals import pool
from tests.examples.words import words  # noqa: F401

pytestmark = pytest.mark.usefixtures("words")


def record(question, answer):
    return Record("chat", (Message("user", question), Message("assistant", answer)))


def by_loop(s, single, pairs):
    total = sum(single[i] * s[i] for i in range(len(s)))
    return total + sum(pairs[i, j] * s[i] * s[j] for i in range(len(s)) for j in range(len(s)) if i != j)


def test_the_graph_is_symmetric_and_both_parts_add_up_to_one():
    tagged = [{0, 1}, {0, 1}, {0, 1, 2}, {3}, {4}]
    single, pairs = graph(tagged, 6)
    assert single.tolist() == pytest.approx(np.array([3, 3, 1, 1, 1, 0]) / 9)
    assert (pairs == pairs.T).all() and pairs.sum() == pytest.approx(1) and (pairs.diagonal() == 0).all()
    assert pairs[0, 1] == pytest.approx(3 / 10) and pairs[0, 2] == pytest.approx(1 / 10)
    lonely, none = graph([{0}, {1}, set()], 2)
    assert lonely.sum() == 1 and none.sum() == 0


def test_the_score_is_the_sum_over_skills_and_pairs():
    generator = np.random.default_rng(0)
    single, pairs = graph([set(generator.choice(6, 3, replace=False).tolist()) for _ in range(20)], 6)
    skills = generator.random((9, 6))
    assert score(skills, single, pairs) == pytest.approx([by_loop(s, single, pairs) for s in skills])
    order = generator.permutation(6)
    assert score(skills[:, order], single[order], pairs[np.ix_(order, order)]) == pytest.approx(score(skills, single, pairs))
    assert score(skills, single, 0 * pairs) == pytest.approx(skills @ single)


def test_a_frequent_pair_outranks_two_unrelated_frequent_skills():
    single, pairs = graph([{0, 1}] * 5 + [{2}] * 5 + [{3}] * 5, 4)
    assert single.tolist() == [0.25] * 4
    together, apart = score(np.array([[1.0, 1, 0, 0], [0, 0, 1, 1]]), single, pairs)
    assert together == pytest.approx(1.5) and apart == pytest.approx(0.5)


def test_only_the_nearest_skills_count():
    likeness = np.array([[0.9, -0.3, 0.2, 0.5], [0.1, 0.0, -1.0, -0.5]])
    assert has(likeness, 2).tolist() == [[0.9, 0, 0, 0.5], [0.1, 0, 0, 0]]
    assert has(likeness, 9).tolist() == [[0.9, 0, 0.2, 0.5], [0.1, 0, 0, 0]]


def test_near_skills_are_one():
    near = np.array([1, 0.1]) / np.hypot(1, 0.1)
    vectors = np.stack([[1, 0], [0, 1], near, [-1, 0], near])
    assert merged(vectors, 0.9).tolist() == [0, 1, 0, 3, 0]
    assert merged(vectors, 0.999).tolist() == [0, 1, 2, 3, 2]


def test_telling_phrases_are_frequent_here_and_rare_elsewhere():
    texts = ["the valve leaks and the pump stops", "the pump and the valve", "a pump valve"]
    others = ["the dog and the cat"] * 30
    found = telling_phrases(texts, others, 2)
    assert all(set(own) & {"pump", "valve"} for own in found) and not any("the" in own or "and" in own for own in found)
    assert telling_phrases(["日本語 日本語"], [], 3) == [["日本語", "日本語 日本語"]]
    assert telling_phrases(["🙂 12"], [], 3) == [[]]
    assert listed("1. Solving equations.\n- The chain rule\n\n* solving equations\n" + "word " * 9, 3) == [
        "solving equations",
        "the chain rule",
    ]


TARGET = [record("Why does the pump stop?", "The valve leaks."), record("The pump stops?", "Check the valve and the seal.")] * 3
POOL = [
    *(
        record(f"Is the {what} well?", f"The {what} is fine, says the doctor; check it, and why does it sleep?")
        for what in ("dog", "cat", "horse", "cow", "hen")
    ),
    record("What when the pump stops?", "Look at the valve."),
    record("How is a valve sealed?", "With a seal, as in a pump."),
]


def test_records_with_the_targets_skills_are_chosen(llama_folder):
    made = pool(llama_folder, POOL)
    made.target = TARGET
    assert set(SkillGraph(count=2).select(made).places.tolist()) == {5, 6}
    assert "the most frequent: pump, " in made.notes[-1]
    made.target = [record("🙂 1?", "12 🙂")]
    with pytest.raises(UserError, match="name no skill"):
        SkillGraph(count=2).select(made)


def test_gradients_are_no_vectors_of_skills():
    with pytest.raises(UserError, match=r"examples\.vectors.*'sentence' or 'base'"):
        catalogue.create("examples", "mass:vectors=gradient")


def test_a_model_may_name_the_skills(monkeypatch, llama_folder):
    asked = []

    class Named:
        def answers(self, prompts, **how):
            asked.extend(prompt[0].content for prompt in prompts)
            return [["- horse\n- doctor"]] * len(prompts)

    monkeypatch.setattr("selectune.examples.skill_graph.responder", lambda settings, pool: Named())
    made = pool(llama_folder, POOL)
    made.target = TARGET
    assert SkillGraph(count=1, named_by="model", centre=False).select(made).places.tolist() == [2]
    assert "The valve leaks." in asked[0] and len(asked) == len(TARGET)
