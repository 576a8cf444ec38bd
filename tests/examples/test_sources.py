"""Divergences, rankings of sources and what transfer says of them: the faithful-if lines."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from selectune.cli import app
from selectune.data import Message, Record
from selectune.errors import UserError
from selectune.examples import sources
from selectune.examples.domains import rank_sources
from selectune.examples.factors import divergence
from selectune.examples.factors.signals import OwnEmbedding
from selectune.examples.factors.store import measure
from selectune.examples.sources import NONE, IntermediateTasks, NearDomains, Trying, distances, fisher, transfer
from tests.examples.test_signals import pool

DRAW = np.random.default_rng(3)
ONE, OTHER = DRAW.standard_normal((30, 6)), DRAW.standard_normal((25, 6)) * 1.5 + 0.7


def chat(question, answer="yes", source=""):
    return Record("chat", (Message("user", question), Message("assistant", answer)), source=source)


@pytest.mark.parametrize("name", divergence.OF_VECTORS)
def test_vectors_of_a_set_do_not_diverge_from_themselves(name):
    compare = divergence.OF_VECTORS[name]
    assert compare(ONE, ONE) == pytest.approx(0, abs=1e-6)
    assert compare(ONE, OTHER) > 1e-3
    assert compare(ONE, OTHER) == pytest.approx(compare(OTHER, ONE))
    assert compare(ONE[::-1], OTHER[::-1]) == pytest.approx(compare(ONE, OTHER))
    nearer = ONE + 0.2 * (OTHER.mean(0) - ONE.mean(0))
    assert name == "coral" or compare(nearer, OTHER) < compare(ONE, OTHER)


def test_moments_and_distances_are_those_of_their_definitions():
    gap = np.cov(ONE.T, bias=True) - np.cov(OTHER.T, bias=True)
    assert divergence.coral(ONE, OTHER) == pytest.approx(np.linalg.norm(gap, "fro") ** 2 / (4 * 6**2))

    def mean(a, b):
        return np.mean([[np.linalg.norm(x - y) for y in b] for x in a])

    assert divergence.energy(ONE, OTHER) == pytest.approx(2 * mean(ONE, OTHER) - mean(ONE, ONE) - mean(OTHER, OTHER))
    both = np.concatenate([ONE, OTHER])
    squares = ((both[:, None] - both[None]) ** 2).sum(-1)
    kernel = np.exp(-squares / np.median(squares[squares > 1e-12]))
    signs = np.concatenate([np.full(len(ONE), 1 / len(ONE)), np.full(len(OTHER), -1 / len(OTHER))])
    assert divergence.maximum_mean_discrepancy(ONE, OTHER) == pytest.approx(signs @ kernel @ signs)
    moved = ONE + 3.0
    assert divergence.wasserstein(ONE, moved) == pytest.approx(
        3.0, rel=0.15
    )  # of one shift, the mean over directions: |shift| / sqrt(d)


def test_words_diverge_as_their_distributions():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    assert divergence.kullback_leibler(p, q) == pytest.approx(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))
    assert divergence.renyi(p, q, 0.5) == pytest.approx(-2 * np.log(np.sqrt(p * q).sum()))
    assert divergence.renyi(p, q, 1 - 1e-7) == pytest.approx(divergence.kullback_leibler(p, q), rel=1e-4)
    assert divergence.jensen_shannon(p, q) == pytest.approx(divergence.jensen_shannon(q, p))
    apart = divergence.distributions(divergence.words(["a b"] * 50), divergence.words(["c d"] * 50))
    assert 0.97 * np.log(2) < divergence.jensen_shannon(*apart) < np.log(2)
    for compare in divergence.OF_WORDS.values():
        assert compare(p, p) == pytest.approx(0, abs=1e-12) and compare(p, q) > 0
    first, second = divergence.distributions(divergence.words(["Red red lamp"]), divergence.words(["lamp"]))
    assert first.tolist() == pytest.approx([1.1 / 3.2, 2.1 / 3.2]) and second.tolist() == pytest.approx([1.1 / 1.2, 0.1 / 1.2])


def test_the_cosine_of_two_domains_is_not_taken_around_their_own_mean():
    near, far = ONE + 10, OTHER + 10
    assert divergence.cosine(*divergence.centred([near, far])) < 0.1  # both point one way, and two alone stay as they are
    third = ONE - 5
    moved = divergence.centred([near, far, third])
    assert np.mean([vectors.mean(0) for vectors in moved], axis=0) == pytest.approx(0)


LAMPS = [chat(f"What does lamp {i} of the panel mean at fault {i * 3}?", f"Lamp {i} is on.") for i in range(12)]
FOXES = [chat(f"The quick brown fox jumps over {i} lazy dogs, then what?", f"It jumps over dog {i}.") for i in range(12)]
PARIS = [chat(f"What is the capital of country {i} of France?", "Paris " * (i % 3 + 1)) for i in range(12)]
TARGET = [chat(f"What does lamp {i} of the panel mean at fault {i * 5}?", f"Lamp {i} is on.") for i in range(20, 30)]
THREE = {"foxes": FOXES, "lamps": LAMPS, "paris": PARIS}


@pytest.mark.parametrize("by", [name for name in sources.CHEAP if name not in ("size", "sentence_embedding")])
def test_the_source_of_the_targets_kind_is_nearest(by, llama_folder):
    far = distances(pool(llama_folder), THREE, TARGET, by)
    assert min(far, key=far.get) == "lamps"
    turned = distances(pool(llama_folder), {name: some[::-1] for name, some in THREE.items()}, TARGET[::-1], by)
    assert far == pytest.approx(turned, rel=1e-4)


def test_the_larger_source_is_nearer_by_size(llama_folder):
    far = distances(pool(llama_folder), {"small": LAMPS[:2], "large": FOXES}, TARGET, "size")
    assert far["large"] < far["small"] and far["large"] == pytest.approx(-np.log(12))


def test_an_embedding_of_a_source_is_the_mean_of_its_texts(llama_folder):
    made = pool(llama_folder)
    vectors = [measure(made, OwnEmbedding(of="question"), some) for some in (*THREE.values(), TARGET)]
    middle = np.mean([one.mean(0) for one in vectors], axis=0)
    means = [one.mean(0) - middle for one in vectors]
    far = distances(made, THREE, TARGET, "text_embedding")
    for own, value in zip(means, far.values(), strict=False):
        assert value == pytest.approx(1 - own @ means[-1] / np.linalg.norm(own) / np.linalg.norm(means[-1]), rel=1e-3)


def test_fisher_information_squares_each_record_by_itself(llama_folder):
    made = pool(llama_folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    trying = Trying(steps=1, learning_rate=1e-12, examples=4)
    found = fisher(made, LAMPS[:4], trying)[name]
    total = 0
    weight = dict(made.base.model.named_parameters())[name]
    weight.requires_grad_(True)
    for record in LAMPS[:4]:
        (piece,) = made.encoder.encode(record)
        labels = torch.tensor([[-100, *piece.labels[1:]]])
        made.base.model(input_ids=torch.tensor([piece.input_ids]), labels=labels, use_cache=False).loss.backward()
        total = total + weight.grad**2 / 4
        weight.grad = None
    assert torch.allclose(found, total, rtol=1e-3, atol=1e-9)


def test_reciprocal_ranks_prefer_who_is_often_first():
    likeness = np.array([[0.9, 0.1, 0.8], [0.5, 0.9, 0.5], [0.1, 0.5, 0.1]])
    fused = sources.reciprocal_ranks(likeness)
    assert fused.tolist() == pytest.approx([2 / 61 + 1 / 63, 1 / 61 + 2 / 62, 1 / 62 + 2 / 63])


def test_transfer_is_measured_on_what_was_held_out_and_the_base_stays(llama_folder):
    made = pool(llama_folder)
    before = {name: value.clone() for name, value in made.base.model.named_parameters()}
    trying = Trying(steps=15, target_steps=2, learning_rate=3e-3)
    found = transfer(made, {"lamps": LAMPS, "foxes": FOXES}, TARGET, trying)
    assert found["lamps"] > found[NONE] and found["lamps"] > found["foxes"]
    few = distances(made, {"lamps": LAMPS, "foxes": FOXES}, TARGET, "few_shot", trying=trying)
    assert few == pytest.approx({name: -value for name, value in found.items() if name != NONE})
    assert all(torch.equal(value, before[name]) for name, value in made.base.model.named_parameters())
    embedded = distances(made, {"lamps": LAMPS, "foxes": FOXES}, TARGET, "task_embedding", trying=trying)
    assert embedded["lamps"] < embedded["foxes"]


def test_the_half_that_is_scored_is_not_trained_on(llama_folder, monkeypatch):
    trained, scored = [], []
    monkeypatch.setattr(sources, "_continued", lambda pool, model, records, *rest: trained.extend(records) or model)
    monkeypatch.setattr(
        "selectune.parameters.factors.trial.loss_on", lambda context, records, model: scored.extend(records) or 1.0
    )
    assert transfer(pool(llama_folder), {"foxes": FOXES}, TARGET, Trying()) == {NONE: np.exp(-1), "foxes": np.exp(-1)}
    learnt, held = ({record.key for record in some} for some in (trained, scored))
    assert held and not learnt & held and {record.key for record in [*TARGET, *FOXES]} == learnt | held


def test_transfer_needs_two_records_that_train(llama_folder):
    unread = [chat("lamp " * 300 + str(n)) for n in range(3)]
    for target in (TARGET[:1], [TARGET[0], *unread], unread):
        with pytest.raises(UserError, match="half of the target"):
            transfer(pool(llama_folder), {"foxes": FOXES}, target, Trying())


def mixed():
    return [Record(one.kind, one.messages, source=name) for name, some in THREE.items() for one in some]


def test_whole_sources_are_kept(llama_folder):
    records = mixed()
    chosen = IntermediateTasks(keep=1, count=12).select(pool(llama_folder, records, target=TARGET))
    assert {records[place].source for place in chosen.places.tolist()} == {"lamps"}
    made = pool(llama_folder, records, target=TARGET)
    chosen = NearDomains(keep=0.6, count=20, ranking="renyi").select(made)  # two of three sources
    kept = {records[place].source for place in chosen.places.tolist()}
    assert len(kept) == 2 and "lamps" in kept and "left:" in made.notes[0]
    more = NearDomains(keep=0.3, count=20, ranking="renyi").select(pool(llama_folder, records, target=TARGET)).places.tolist()
    assert {records[place].source for place in more[:12]} == {"lamps"}  # the rest of the budget: the next source
    assert len({records[place].source for place in more[12:]}) == 1


def test_sources_that_are_no_better_than_none_are_named(llama_folder, monkeypatch):
    worth = {"foxes": 0.4, "lamps": 0.6, "paris": 0.5}
    monkeypatch.setattr(sources, "transfer", lambda *given: {NONE: 0.5, **worth})
    made = pool(llama_folder, mixed(), target=TARGET)
    IntermediateTasks(ranking="few_shot", keep=2, count=12).select(made)
    assert made.notes == [
        "no better than training on the target alone: foxes, paris",
        "kept: lamps, paris; left: foxes (by few_shot)",
    ]
    made.notes.clear()
    worth.update(foxes=0.7, paris=0.7)
    IntermediateTasks(ranking="few_shot", keep=2, count=12).select(made)
    assert len(made.notes) == 1


@pytest.fixture
def files(tmp_path):
    for name, some in (*THREE.items(), ("target", TARGET)):
        lines = [json.dumps({"question": one.question, "answer": one.response}) for one in some]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_command_ranks_and_judges(files, llama_folder):
    given = [str(files / f"{name}.jsonl") for name in THREE]
    options = ["--target", str(files / "target.jsonl"), "--base", str(llama_folder), "--quiet"]
    done = CliRunner().invoke(app, ["domains", *given, *options, "--by", "renyi,mmd", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert [ranking["by"] for ranking in told["rankings"]] == ["renyi", "mmd"] and not told["transfer"]
    found = rank_sources(given, str(files / "target.jsonl"), by=["renyi", "size"], steps=3, base=str(llama_folder), quiet=True)
    best = max((name for name in given), key=found.transfer.get)
    for ranking in found.rankings:
        assert (ranking.regret[1] == 0) == (ranking.order[0] == best) and set(ranking.regret) == {1}
    shown = CliRunner().invoke(app, ["domains", *given, *options, "--steps", "2"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "Regret@1" in shown.output and NONE in shown.output


def test_mistakes_are_one_line(files, llama_folder):
    good = str(files / "lamps.jsonl")
    for wrong, told in (
        ({"by": ["mdm"]}, "did you mean 'mmd'"),
        ({"sources": [good, good]}, "twice"),
        ({"sources": ["nowhere.jsonl"]}, "nowhere"),
        ({"target": "nowhere.jsonl"}, "nowhere"),
    ):
        with pytest.raises(UserError, match=told) as error:
            rank_sources(**({"sources": [good], "target": good, "base": str(llama_folder), "quiet": True} | wrong))
        assert "\n" not in str(error.value)
