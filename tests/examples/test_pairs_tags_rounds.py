"""DELIFT, NN-CIFT, InsTag, kMQ-Iter: the faithful-if lines of their cards."""

import numpy as np
import pytest
import torch

from selectune.data import Message, Record
from selectune.errors import UserError
from selectune.examples import delift
from selectune.examples.delift import GuessedUtility, InContextUtility, distance, guessed, utilities
from selectune.examples.factors.shown import shown_alone, shown_before
from selectune.examples.factors.submodular import FacilityLocation, OfMatrix, lazy_greedy
from selectune.examples.refined import Refined, reweighed
from selectune.examples.tags import complexity_first, style
from selectune.examples.toward_target import Balanced
from tests.contracts.test_examples import no_download  # noqa: F401
from tests.examples.test_samplers import value
from tests.examples.test_signals import RECORDS, pool


def test_the_distance_is_that_of_the_tokens_probabilities(llama_folder):
    made = pool(llama_folder)
    piece = shown_alone(made.worker(), RECORDS[2])
    with torch.no_grad():
        logits = made.base.model(input_ids=torch.tensor([piece.input_ids]), use_cache=False).logits[0, :-1].double()
    labels = torch.tensor(piece.labels[1:])
    kept = (labels != -100).nonzero().squeeze(-1)
    p = logits.softmax(-1)[kept, labels[kept]]
    assert distance(made.worker(), [piece])[0] == pytest.approx(float((1 - p).norm() / len(p) ** 0.5), rel=1e-4)


def test_an_example_is_read_and_not_scored(llama_folder):
    made = pool(llama_folder)
    worker = made.worker()
    alone, after = shown_alone(worker, RECORDS[2]), shown_before(worker, RECORDS[1], RECORDS[2])
    assert [label for label in after.labels if label != -100] == [label for label in alone.labels if label != -100]
    assert len(after.input_ids) > len(alone.input_ids)
    found = utilities(made, RECORDS[:3], RECORDS[:4])
    expected = distance(worker, [alone])[0] - distance(worker, [after])[0]
    assert found.shape == (3, 4) and found[2, 1] == pytest.approx(expected, abs=1e-5)
    assert np.array_equal(np.isnan(found), np.eye(3, 4, dtype=bool))


def test_help_is_kept_record_by_record_for_all_budgets(llama_folder, tmp_path, monkeypatch):
    plain, calls = delift.distance, []

    def stopping(worker, pieces):
        calls.append(len(pieces))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(worker, pieces)

    method = InContextUtility(count=3)
    monkeypatch.setattr(delift, "distance", stopping)
    with pytest.raises(KeyboardInterrupt):
        method.select(pool(llama_folder, folder=tmp_path))
    found = [method.model_copy(update={"count": count}).select(pool(llama_folder, folder=tmp_path)) for count in (3, 5)]
    assert calls == [len(RECORDS)] * (len(RECORDS) + 1)  # itself and all others; what was stopped, twice
    assert found[0].places.tolist() == found[1].places[:3].tolist() == method.select(pool(llama_folder)).places.tolist()


def test_a_long_example_is_never_scored_in_the_record_s_place(llama_folder):
    made = pool(llama_folder)
    worker, record = made.worker(), RECORDS[2]
    own = [label for label in shown_alone(worker, record).labels if label != -100]
    long = [Record("chat", (Message("user", "What?"), Message("assistant", "Lamp red. " * times))) for times in (20, 1000)]
    behind = shown_before(worker, long[0], record)
    assert len(behind.input_ids) > worker.encoder.max_length  # the model's context holds it
    assert [label for label in behind.labels if label != -100] == own
    assert shown_before(worker, long[1], record) is None
    assert np.isnan(utilities(made, [record], long)[0]).tolist() == [False, True]


def harmful(worker, pieces):
    """Every example does harm, a long one most."""
    return np.array([len(piece.input_ids) / 1000 for piece in pieces])


@pytest.fixture
def maximised(monkeypatch):
    """The kernels that are maximised."""
    seen, plain = [], delift.OfMatrix
    monkeypatch.setattr(delift, "distance", harmful)
    monkeypatch.setattr(delift, "OfMatrix", lambda kernel: seen.append(kernel) or plain(kernel))
    return seen


def test_where_examples_do_harm_no_record_covers_itself_or_its_equal(llama_folder, maximised):
    long = Record("chat", (Message("user", "What?"), Message("assistant", "Lamp red. " * 1000)))
    made = pool(llama_folder, [*RECORDS[:5], RECORDS[2], long])
    InContextUtility(count=2).choose(made)
    keys = np.array([made.keys[place] for place in made.order])
    none = (keys[:, None] == keys[None]) | (keys == long.key)  # the long one leaves no room for another
    assert (maximised[0][none] == 0).all()
    assert maximised[0][~none].min() == 0 and maximised[0][~none].max() == 1


def test_no_record_is_guessed_to_help_itself_or_its_equal(llama_folder, maximised):
    made = pool(llama_folder, [*RECORDS, RECORDS[2]])
    GuessedUtility(count=2, measured=0.4).choose(made)
    keys = np.array([made.keys[place] for place in made.order[made.generator("corner").permutation(len(made))]])
    equal = keys[:, None] == keys
    assert (maximised[0][equal] == 0).all() and equal.sum() == len(made) + 2
    assert (maximised[0][~equal] > 0).mean() > 0.9 and maximised[0].max() == 1


def test_the_measured_part_of_the_target_is_drawn_whatever_its_order(llama_folder, monkeypatch):
    met, plain = [], delift.utilities

    def listening(pool, helped, helpers):
        met.append([record.key for record in helpers])
        return plain(pool, helped, helpers)

    monkeypatch.setattr(delift, "utilities", listening)
    for target, seed in ((RECORDS, 0), (RECORDS[::-1], 0), (RECORDS, 1)):
        made = pool(llama_folder, RECORDS[:3], target=target, seed=seed)
        GuessedUtility(stage="target", count=2, measured=0.4).choose(made)
    first, turned, other = met[1::2]
    assert len(first) == 4 and first == turned != other
    assert first not in ([record.key for record in RECORDS[:4]], sorted(record.key for record in RECORDS)[:4])


def test_pairs_without_a_utility_teach_nothing_and_stay():
    vectors = np.eye(12, 8, dtype=np.float32)
    known = np.where(np.eye(6, dtype=bool), np.nan, 0.7)
    found, _ = guessed(known, vectors, vectors, seed=0)
    assert np.array_equal(found[:6, :6], known, equal_nan=True) and found[6:, 6:] == pytest.approx(0.7)
    assert np.isnan(guessed(known[:1, :1], vectors, vectors, seed=0)[0]).all()


def test_stages_and_large_pools_that_make_no_sense_are_refused(llama_folder):
    for method in (InContextUtility, GuessedUtility):
        with pytest.raises(UserError, match="pairs"):
            method(most=3, count=2).select(pool(llama_folder))
    with pytest.raises(UserError, match="target"):
        InContextUtility(stage="target", count=2).select(pool(llama_folder))
    for stage in ("target", "continual"):
        made = pool(llama_folder, RECORDS[:6], target=RECORDS[6:9])
        assert len(InContextUtility(stage=stage, count=2).select(made).places) == 2


def test_a_network_learns_a_learnable_influence_and_keeps_what_is_known():
    vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    true = vectors @ vectors.T
    found, (own, plain) = guessed(true[:40, :40], vectors, vectors, seed=0)
    assert np.array_equal(found[:40, :40], true[:40, :40])
    unseen = np.mean((found[40:, 40:] - true[40:, 40:]) ** 2)
    assert unseen < 0.5 * np.mean(true[40:, 40:] ** 2)
    assert np.array_equal(guessed(true, vectors, vectors, seed=0)[0], true)
    assert plain == pytest.approx(true[:40, :40].var(), rel=0.3) and own < 0.5 * plain


def test_learning_stops_where_pairs_that_do_not_teach_are_guessed_no_better(monkeypatch):
    generator, epochs, plain = np.random.default_rng(0), [], torch.randperm
    vectors, noise = generator.normal(size=(30, 8)).astype(np.float32), generator.normal(size=(20, 20))
    monkeypatch.setattr(torch, "randperm", lambda count, **options: epochs.append(count) or plain(count, **options))
    one = guessed(noise, vectors, vectors, seed=0)
    assert epochs[0] == 400 and set(epochs[1:]) == {320} and len(epochs) - 1 < 60
    epochs.clear()
    _, (own, mean) = guessed(noise, vectors, vectors, seed=0, epochs=60, patience=60)
    assert len(epochs) - 1 == 60 and own <= one[1][0]
    assert mean == pytest.approx(noise.var(), rel=0.4) and own > 0.8 * mean
    assert np.isnan(guessed(noise[:1, :2], vectors, vectors, seed=0)[1]).all()


def test_the_error_of_guesses_is_told(llama_folder):
    made = pool(llama_folder, RECORDS, target=RECORDS[:6])
    GuessedUtility(stage="target", count=2, measured=0.6).choose(made)
    assert "10 examples for 10" in made.notes[0] and "6 examples for 10" in made.notes[1]
    assert all("mean squared error" in note and "nan" not in note for note in made.notes)
    few = pool(llama_folder, RECORDS[:3])
    GuessedUtility(count=2).choose(few)
    assert "too few" in few.notes[0]


def test_the_first_pass_covers_every_tag_and_records_without_tags_never_come():
    tagged = [{"a", "b", "c"}, {"a"}, {"d"}, {"a", "b"}, set(), {"e", "d"}]
    chosen = complexity_first(tagged, np.arange(6), 6)
    assert chosen == [0, 5, 3, 2, 1]
    assert set().union(*(tagged[place] for place in chosen[:2])) == {"a", "b", "c", "d", "e"}
    assert complexity_first(tagged, np.arange(6), 2) == [0, 5]


def test_styles_are_forms():
    def answer(text):
        return style(Record("chat", (Message("user", "?"), Message("assistant", text))))

    assert answer("yes") == ["short"]
    assert "steps" in answer("1. First\n2. Then") and "code" in answer("```python\n```") and "list" in answer("- one\n- two")


def test_shares_follow_scores_and_constant_ones_change_nothing(llama_folder):
    even = np.full(4, 0.25)
    assert reweighed(even, np.ones(4)) == pytest.approx(even)
    assert reweighed(even, np.zeros(4)) == pytest.approx(even)
    moved = reweighed(even, np.array([0.0, 1, 1, 2]))
    assert moved[0] == 0 and moved.sum() == pytest.approx(1) and moved[3] == 0.5
    choice = Refined(count=6, clusters=3, rounds=3, steps=2).select(pool(llama_folder))
    assert len(set(choice.places.tolist())) == 6


def test_a_certain_answer_is_at_no_distance(monkeypatch, llama_folder):
    worker = pool(llama_folder).worker()
    monkeypatch.setattr(type(worker), "log_probabilities", lambda self, pieces: [np.zeros(3), np.log(np.full(4, 0.5))])
    assert distance(worker, [None, None]) == pytest.approx([0, 0.5])


def test_the_objectives_are_monotone_and_submodular_and_their_bounds_end_where_they_do_nothing():
    kernel = np.random.default_rng(0).random((5, 5))
    toward = np.random.default_rng(1).random(5)
    sets = [[place for place in range(5) if number >> place & 1] for number in range(32)]
    for options in ({}, {"floor": toward}, {"cap": toward}):
        for large in sets:
            for small in (some for some in sets if set(some) <= set(large)):
                for place in set(range(5)) - set(large):
                    gain = [value(kernel, [*some, place], **options) - value(kernel, some, **options) for some in (small, large)]
                    assert gain[0] >= gain[1] - 1e-12 and gain[1] >= -1e-12
    plain = lazy_greedy(FacilityLocation(OfMatrix(kernel)), 5)
    for options in ({"floor": np.zeros(5)}, {"cap": np.ones(5)}):
        bounded = lazy_greedy(FacilityLocation(OfMatrix(kernel), **options), 5)
        assert np.array_equal(bounded[0], plain[0]) and np.allclose(bounded[1], plain[1])
    for moved in (3 * kernel, kernel + 0.2):
        assert np.array_equal(lazy_greedy(FacilityLocation(OfMatrix(moved)), 5)[0], plain[0])


def test_toward_a_target_its_kind_comes_first_and_beside_what_is_known_last(llama_folder, monkeypatch):
    helps = np.array([[1.0, 0.2, 0.1, 0.1], [0.2, 1.0, 0.1, 0.1], [0.1, 0.1, 0.9, 0.8], [0.1, 0.1, 0.8, 0.9]])
    toward = np.array([0.0, 0.0, 1.0, 1.0])  # how well the target's examples help with each record
    made = pool(llama_folder, RECORDS[:4], target=RECORDS[6:8])
    place_of = {key: place for place, key in enumerate(made.keys)}

    def known(pool, helped, helpers):
        own = [place_of[record.key] for record in helped]
        if helpers[0].key in place_of:
            return helps[np.ix_(own, [place_of[record.key] for record in helpers])]
        return np.tile(toward[own, None], (1, len(helpers)))

    monkeypatch.setattr(delift, "utilities", known)
    first = {stage: InContextUtility(stage=stage, count=1).select(made).places[0] for stage in ("target", "continual")}
    assert first["target"] in (2, 3) and first["continual"] in (0, 1)
    assert GuessedUtility.choose is InContextUtility.choose


def test_the_order_of_the_target_changes_no_group(llama_folder):
    target = RECORDS[2:9]
    chosen = [
        Balanced(groups=3, count=3).select(pool(llama_folder, RECORDS[:6], target=some)).places.tolist()
        for some in (target, target[::-1])
    ]
    assert chosen[0] == chosen[1]


def test_guesses_know_who_helps_whom():
    source = np.random.default_rng(0)
    rows = source.normal(size=(60, 4))
    columns = source.normal(size=(60, 4))
    known = np.repeat(rows[:40, :1], 40, axis=1)
    found, _ = guessed(known, rows, columns, 0, epochs=200)
    wanted = np.repeat(rows[40:, :1], 20, axis=1).ravel()
    assert np.corrcoef(found[40:, 40:].ravel(), wanted)[0, 1] > 0.8 > abs(np.corrcoef(found[40:, 40:].T.ravel(), wanted)[0, 1])
