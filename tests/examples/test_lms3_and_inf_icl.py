"""LMS3 and InfICL: the faithful-if lines of their cards."""

import numpy as np
import pytest
import torch
from scipy.stats import zscore

from selectune.data import Message, Record
from selectune.examples.factors.store import measure
from selectune.examples.inf_icl import Probe, ProbeInfluence
from selectune.examples.lms3 import LastState, SimilarAndStable, attention_matrices, nearest_and_steady
from tests.contracts.test_examples import no_download  # noqa: F401
from tests.examples.test_signals import RECORDS, pool


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_heads_are_the_sum_over_query_heads(tiny_folders, architecture):
    base = pool(tiny_folders[architecture]).base
    product, value = attention_matrices(base)
    one, other = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    if architecture == "llama":
        last = base.model.model.layers[-1].self_attn
        query, key = last.q_proj(one).view(4, 16), last.k_proj(other).view(2, 16)
        assert torch.allclose(value @ one, last.v_proj(one), atol=1e-5)
    else:
        whole, bias = base.model.transformer.h[-1].attn.c_attn, base.model.transformer.h[-1].attn.c_attn.bias
        query, key = (whole(one) - bias)[:64].view(4, 16), (whole(other) - bias)[64:128].view(4, 16)
        assert torch.allclose(value @ one, (whole(one) - bias)[128:], atol=1e-5)
    by_heads = sum(float(query[head] @ key[head // (4 // len(key))]) for head in range(4))
    assert float(other @ product @ one) == pytest.approx(by_heads, rel=1e-4)


def test_states_are_those_of_the_last_real_token(llama_folder):
    made = pool(llama_folder)
    found, words = measure(made, LastState()), made.base.tokenizer
    for side in ("left", "right"):
        words.padding_side = side
        rows = words([record.question for record in RECORDS[:4]], return_tensors="pt", padding="max_length", max_length=60)
        with torch.no_grad():
            states = made.base.model.model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"],
                                           position_ids=(rows["attention_mask"].cumsum(1) - 1).clamp(min=0)).last_hidden_state  # fmt: skip
        places = [int(mask.nonzero().max()) for mask in rows["attention_mask"]]
        assert np.allclose(found[:4], states[range(4), places], atol=1e-4)


def test_far_records_are_rejected_and_the_product_decides():
    distances = np.array([[3.0, 1.0, 2.0, 4.0], [1.0, 5.0, 6.0, 4.0]])
    steady = np.array([1.0, 9.0, 2.0, 1.0])
    scores, accepted = nearest_and_steady(distances, steady, 0.25)
    assert accepted.tolist() == [True, True, False, False] and scores.tolist() == [1, 9, 4, 4]
    assert nearest_and_steady(distances, steady, 1)[1].all() and not nearest_and_steady(distances, steady, 0)[1].any()
    assert nearest_and_steady(distances, steady, 0.01)[1].tolist() == [True, True, False, False]  # one at least
    many = np.arange(100.0)[None]
    assert nearest_and_steady(many, many[0], 0.29)[1].sum() == 29
    scores, _ = nearest_and_steady(distances, np.ones(4), 1)
    assert scores.tolist() == distances.min(0).tolist()


def test_accepted_records_come_first_whatever_the_number_of_targets(llama_folder):
    target = [Record("chat", (Message("user", f"Which lamp is {i}?"), Message("assistant", "red"))) for i in range(20)]
    made = pool(llama_folder, target=target)
    found = SimilarAndStable(count=3, accepted=0.2).score(made)
    kept = found["accepted"] == 1
    assert 0 < kept.sum() < len(RECORDS) and found["fit"][kept].min() > 0 > found["fit"][~kept].max()
    product, value = (matrix.double() for matrix in attention_matrices(made.base))
    states, wanted = (torch.tensor(measure(made, LastState(), some)).double() for some in (RECORDS, target))
    distances = torch.stack([torch.stack([(h - product @ x).norm() for x in states]) for h in wanted]).numpy()
    steady = np.array([float((value @ x).norm()) for x in states])
    expected, accepted = nearest_and_steady(distances, steady, 0.2)
    assert np.array_equal(accepted, kept) and found["fit"][kept] == pytest.approx(1 / (1 + expected[kept]), rel=1e-3)


def problem(n=80, d=4, classes=3, seed=0):
    generator = np.random.default_rng(seed)
    features, target = generator.normal(size=(n, d)), generator.normal(size=(50, d))
    direction = generator.normal(size=(d, classes))
    noise = generator.gumbel(size=(n, classes))
    return features, (features @ direction + noise).argmax(1), target, (target @ direction).argmax(1)


def test_leaving_a_record_out_changes_the_targets_loss_as_foretold():
    features, labels, target, answers = problem(n=200)

    def loss(probe):
        return -np.log(probe.probabilities(target)[np.arange(50), answers]).sum()

    def refitted(without):
        rest = np.arange(200) != without  # the same objective less one record: the mean is still over 200, so is the penalty
        return Probe(features[rest], labels[rest], 3, 1e-2 * 200 / 199)

    whole = Probe(features, labels, 3, 1e-2)
    foretold = -whole.influence(features, labels, target, answers) / 200
    largest = np.argsort(-np.abs(foretold))[:6]
    changed = np.array([loss(refitted(i)) - loss(whole) for i in largest])
    assert changed == pytest.approx(foretold[largest], rel=0.12)
    some = list(range(0, 200, 10))
    changed = np.array([loss(refitted(i)) - loss(whole) for i in some])
    assert np.corrcoef(changed, foretold[some])[0, 1] > 0.99


def test_conjugate_gradients_are_a_solve_and_flipped_labels_harm():
    features, labels, target, answers = problem()
    probe = Probe(features, labels, 3, 1e-2)
    hessian = np.stack([probe.hessian_product(row.reshape(3, 4)).reshape(-1) for row in np.eye(12)])
    gradient = np.random.default_rng(1).normal(size=(3, 4))
    assert probe.solve(gradient).reshape(-1) == pytest.approx(np.linalg.solve(hessian, gradient.reshape(-1)), rel=1e-5)
    p = probe.probabilities(features)
    exact = sum(np.kron(np.diag(q) - np.outer(q, q), np.outer(x, x)) for q, x in zip(p, features, strict=True)) / len(p)
    assert hessian == pytest.approx(exact + 1e-2 * np.eye(12), abs=1e-10)
    features, _, target, answers = problem(n=300, seed=2)
    clean = Probe(target, answers, 3, 1e-2).probabilities(features).argmax(1)
    flipped = np.random.default_rng(3).choice(300, 20, replace=False)
    given = clean.copy()
    given[flipped] = (given[flipped] + 1) % 3
    influence = Probe(features, given, 3, 1e-2).influence(features, given, target, answers)
    assert (influence[flipped] > 0).mean() > 0.8


def test_classes_share_equally_with_labels_and_without(llama_folder):
    def labelled(i):
        answer = int(i % 3 > 0)
        return Record(
            "classification",
            (Message("user", f"Lamp {i}?"), Message("assistant", "ab"[answer])),
            choices=("a", "b"),
            answer=answer,
        )

    records = [labelled(i) for i in range(12)]
    method, made = ProbeInfluence(count=6), pool(llama_folder, records, target=records[:4])
    choice = method.select(made)
    assert sum(records[place].answer for place in choice.places) == 3
    vectors, labels = measure(made, method.signal()).astype(np.float64), np.array([record.answer for record in records])
    features = np.c_[zscore(vectors), np.ones(12)]  # of one scale, and with an intercept
    probe = Probe(features, labels, 2, method.weight)
    expected = probe.influence(features, labels, features[:4], labels[:4])
    assert choice.signals["influence on the target's loss"] == pytest.approx(
        expected, rel=1e-3, abs=1e-4 * np.abs(expected).max()
    )
    made = pool(llama_folder, target=RECORDS[:4])
    free = ProbeInfluence(count=6, clusters=3).select(made)
    own, asked = ProbeInfluence(clusters=3).classes(made)
    assert np.array_equal(own[:4], asked) and len(set(own.tolist())) == 3  # the target's records are in the pool
    assert len({int(free.signals["class"][place]) for place in free.places}) == 3
    signal = free.signals["influence on the target's loss"]
    for group in range(3):
        inside = np.flatnonzero(free.signals["class"] == group)
        taken = [place for place in inside if place in free.places]
        assert signal[taken].max() <= min([signal[place] for place in inside if place not in free.places], default=np.inf)
