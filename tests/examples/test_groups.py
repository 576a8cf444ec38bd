"""Methods that choose within groups of like records, against direct evaluation."""

import numpy as np
import pytest

from selectune.data import Message, Record
from selectune.examples import diverse, refined
from selectune.examples.diverse import ClusteredDifficulty, Determinant, EasyAndHard
from selectune.examples.factors.strata import k_means
from selectune.examples.method import ranked
from selectune.examples.refined import Refined
from tests.examples.test_signals import pool

RECORDS = [Record("chat", (Message("user", f"What is {i}?"), Message("assistant", f"lamp {i}"))) for i in range(24)]


@pytest.fixture
def grouped(llama_folder, monkeypatch):
    """Three far groups of 4, 8 and 12 records, each on a way out from its centre."""
    source, sizes = np.random.default_rng(0), (4, 8, 12)
    labels = np.repeat(np.arange(3), sizes)
    vectors = np.eye(3)[labels] + 0.2 * source.normal(size=(24, 3))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    monkeypatch.setattr(diverse.Embedded, "embed", lambda self, pool: vectors)
    made = pool(llama_folder, RECORDS)
    found, centres = k_means(vectors, 3, made.seed, made.order)
    assert all(len(set(found[labels == one])) == 1 for one in range(3))
    return made, vectors, found, centres / np.linalg.norm(centres, axis=1, keepdims=True)


@pytest.mark.parametrize("easy", [1.0, 0.0, 0.5])
def test_the_nearest_and_the_farthest_of_each_group(grouped, easy):
    made, vectors, labels, centres = grouped
    chosen = set(EasyAndHard(clusters=3, easy=easy, random=0.0, count=6).select(made).places.tolist())
    distance = 1 - (vectors * centres[labels]).sum(1)
    for label in range(3):
        group = sorted(np.flatnonzero(labels == label), key=lambda place: distance[place])
        wanted = {1.0: group[:2], 0.0: group[-2:], 0.5: [group[0], group[-1]]}[easy]
        assert chosen & set(group) == set(wanted)


def test_a_small_group_is_taken_whole_and_hands_the_rest_on(grouped):
    made, _, labels, _ = grouped
    chosen = EasyAndHard(clusters=3, easy=1.0, random=0.0, count=18).select(made).places
    assert sorted(np.bincount(labels[chosen]).tolist()) == [4, 7, 7]


def test_the_random_base_comes_first(grouped):
    made = grouped[0]
    chosen = EasyAndHard(clusters=3, random=0.5, count=6).select(made).places.tolist()
    base = ranked(made, made.uniform("deft base")).tolist()
    assert chosen[:3] == base[:3] and not set(chosen[3:]) & set(base[:3])


def test_what_has_no_gradient_is_not_unusual(grouped, monkeypatch):
    made, vectors, _, _ = grouped
    silent = vectors.copy()
    silent[[2, 9]] = 0
    monkeypatch.setattr(diverse.Embedded, "embed", lambda self, pool: silent)
    choice = EasyAndHard(clusters=3, easy=0.0, random=0.0, count=22).select(made)
    assert not {2, 9} & set(choice.places.tolist()) and "2 records have nothing to learn" in made.notes[0]


def test_the_hardest_of_each_group_in_the_groups_proportion(grouped, monkeypatch):
    """What no context helps with (1 and more) comes last within its group."""
    made, _, labels, _ = grouped
    ratio = np.random.default_rng(1).uniform(0.2, 1.3, 24)
    monkeypatch.setattr(diverse, "difficulty", lambda pool: {"instruction-following difficulty": ratio})
    chosen = set(ClusteredDifficulty(clusters=3, count=12).select(made).places.tolist())
    for label in range(3):
        group = sorted(
            np.flatnonzero(labels == label),
            key=lambda place: (ratio[place] >= 1, -ratio[place] if ratio[place] < 1 else ratio[place]),
        )
        assert chosen & set(group) == set(group[: len(group) // 2])


def test_a_group_of_which_nothing_is_known_has_no_share(grouped, monkeypatch):
    made, _, labels, _ = grouped
    ratio = np.where(labels == labels[0], np.nan, np.random.default_rng(1).uniform(0.2, 1.3, 24))
    monkeypatch.setattr(diverse, "difficulty", lambda pool: {"instruction-following difficulty": ratio})
    chosen = ClusteredDifficulty(clusters=3, count=10).select(made).places
    assert sorted(np.bincount(labels[chosen], minlength=3).tolist()) == [0, 4, 6]
    assert "4 records have nothing to learn" in made.notes[0]


def test_the_note_on_diversity_is_of_what_was_chosen_by_tokens_too(llama_folder, monkeypatch):
    vectors = np.repeat(np.eye(24, dtype=np.float32)[:6], 4, axis=0)  # six kinds of record, four of each
    monkeypatch.setattr(diverse.Embedded, "embed", lambda self, pool: vectors)
    made = pool(llama_folder, RECORDS)
    tokens = int(np.sort(made.tokens)[:6].sum())
    chosen = Determinant(count=tokens, by="tokens").select(made).places
    assert 3 <= len(chosen) <= 6 and float(made.notes[0].split(" are ")[1].split()[0]) > 0.1


def test_a_single_round_is_equal_shares_and_a_worthless_group_gives_no_more(grouped, monkeypatch):
    made, _, labels, _ = grouped
    chosen = Refined(rounds=1, clusters=3, count=9).select(made).places
    assert np.bincount(labels[chosen]).tolist() == [3, 3, 3]
    monkeypatch.setattr(Refined, "_weigh", lambda *_: np.array([0.0, 0.5, 0.5]))
    chosen = Refined(rounds=2, clusters=3, count=12).select(made).places
    assert np.bincount(labels[chosen])[0] == 2  # of the first round
    assert len(set(chosen.tolist())) == 12


def test_shares_follow_what_the_new_records_of_a_group_have_learnt(grouped, monkeypatch):
    """Group 0 falls from 2 to 1, group 1 stays at 2; group 2 gave nothing new and has the mean score."""
    made, _, labels, _ = grouped
    place_of = {key: place for place, key in enumerate(made.keys)}
    learnt = []

    def losses(self, pool):
        learnt.append([record.key for record in self.records])
        return np.array([1.0 if labels[place_of[key]] == 0 else 2.0 for key in pool.keys])

    monkeypatch.setattr(refined.Learnt, "losses", losses)
    monkeypatch.setattr(refined, "measure", lambda pool, signal, records: np.full(len(records), 2.0))
    chosen, new = list(range(24)), [int(np.flatnonzero(labels == group)[0]) for group in (0, 1)]
    old = np.array([0.2, 0.3, 0.5])
    found = Refined()._weigh(made, chosen, new, labels, [0, 1, 2], old)
    scores = np.array([np.e, 1.0, (np.e + 1) / 2])
    assert found == pytest.approx(old * scores / (old * scores).sum())
    assert learnt == [made.keys]  # what was chosen before is learnt, too
