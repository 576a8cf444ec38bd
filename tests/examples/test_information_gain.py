"""IGF: gains against steps by hand and against gradients, learners against what can be learnt."""

import numpy as np
import pytest
import torch

from selectune.data import Message, Record
from selectune.examples.information_gain import (
    InformationGain,
    gains_of_gradients,
    gains_of_steps,
    told_by_convolution,
    told_by_ridge,
)
from selectune.parameters.factors import trial
from selectune.parameters.factors.targets import targets
from selectune.parameters.factors.trial import loss_on
from tests.examples.test_signals import RECORDS, pool


def slopes(made, record):
    """The gradient of a record's mean loss in the blocks' matrices, flat."""
    names = {target.name for target in targets(made.base)}
    weights = [value for name, value in made.base.model.named_parameters() if name in names]
    (piece,) = made.encoder.encode(record)
    for weight in weights:
        weight.requires_grad_(True)
    loss = made.base.model(
        input_ids=torch.tensor([piece.input_ids]), labels=torch.tensor([[-100, *piece.labels[1:]]]), use_cache=False
    ).loss
    found = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return torch.cat([slope.flatten() for slope in found]).double()


def test_a_small_step_gains_what_gradients_say_and_the_base_is_as_before(llama_folder):
    made = pool(llama_folder)
    before = {name: value.clone() for name, value in made.base.model.state_dict().items()}
    objective, some = RECORDS[3:4], RECORDS[4:9]
    rate = 1e-4
    found = gains_of_steps(made, some, objective, "sgd", rate, 1e9)
    assert all(torch.equal(value, before[name]) for name, value in made.base.model.state_dict().items())
    perplexity = np.exp(loss_on(made.context(objective), objective))
    wanted = slopes(made, objective[0])
    exact = np.array([perplexity * float(wanted @ slopes(made, record)) for record in some])
    assert found / rate == pytest.approx(exact, rel=0.1)
    clipped = gains_of_steps(made, some, objective, "sgd", rate, 1e-3) / rate
    norms = np.array([float(slopes(made, record).norm()) for record in some])
    assert clipped == pytest.approx(exact * 1e-3 / norms, rel=0.25, abs=0.02 * np.abs(exact / norms).max())
    sketched = gains_of_gradients(made, some, objective)
    assert np.corrcoef(sketched, exact)[0, 1] > 0.9 and sketched @ exact / (exact @ exact) == pytest.approx(1, abs=0.3)
    assert np.isnan(gains_of_steps(made, [Record("chat", (Message("user", "?"),))], objective, "sgd", rate, 1.0))[0]


def test_steps_are_kept_one_by_one(llama_folder, tmp_path, monkeypatch):
    method, plain, asked = InformationGain(count=3, measured=6), trial.trial, []

    def stopping(*args, records, **settings):
        asked.append(records[0].key)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return plain(*args, records=records, **settings)

    monkeypatch.setattr(trial, "trial", stopping)
    with pytest.raises(KeyboardInterrupt):
        method.score(pool(llama_folder, target=RECORDS[3:4], folder=tmp_path))
    found = method.score(pool(llama_folder, target=RECORDS[3:4], folder=tmp_path))
    assert len(set(asked)) == 6 and len(asked) == 7  # the one that was stopped, twice
    alone = method.score(pool(llama_folder, target=RECORDS[3:4]))
    assert all(np.array_equal(found[name], alone[name], equal_nan=True) for name in alone)


def test_records_of_the_objective_count_by_their_tokens(llama_folder):
    made, some = pool(llama_folder), RECORDS[5:9]
    tokens = made.tokens[[0, 3]]
    assert tokens[1] > 1.3 * tokens[0]

    def slope(objective):
        return gains_of_gradients(made, some, objective) / np.exp(loss_on(made.context(objective), objective))

    one, other = slope(RECORDS[:1]), slope(RECORDS[3:4])
    expected = (tokens[0] * one + tokens[1] * other) / tokens.sum()
    assert slope([RECORDS[0], RECORDS[3]]) == pytest.approx(expected, rel=1e-3, abs=1e-4 * np.abs(expected).max())


def words(kinds, seed):
    generator = np.random.default_rng(seed)
    return [generator.integers(10, 20, size=12).tolist() + ([7] if kind else []) for kind in kinds]


def test_learners_learn_what_can_be_learnt():
    generator = np.random.default_rng(0)
    vectors, direction = generator.normal(size=(90, 6)), generator.normal(size=6)
    gains = vectors @ direction
    moved = vectors * 10.0 ** np.arange(-2, 4) + 100  # each dimension on a scale of its own
    assert told_by_ridge(moved[:60], gains[:60], moved[60:]) == pytest.approx(gains[60:], abs=0.2 * gains.std())
    kinds = generator.integers(0, 2, size=160)
    rows = words(kinds, 1)
    table = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    told = [
        told_by_convolution(table, rows[:120], kinds[:120] * 2.0 - 1, some, epochs=30, rate=3e-3, seed=0)
        for some in (rows[120:], rows[120:], rows[150:])
    ]
    assert np.corrcoef(told[0], kinds[120:])[0, 1] > 0.8 and np.array_equal(told[0], told[1])
    assert told[2] == pytest.approx(told[0][30:], abs=1e-5)  # padding does not count
    same = told_by_convolution(table, rows[:8], kinds[:8] * 2.0 - 1, [[7] * 5, [7] * 9], epochs=2, rate=3e-3, seed=0)
    assert same[0] == pytest.approx(same[1], abs=1e-5)  # the largest over the places, however many there are
    nothing = told_by_convolution(table, rows[:8], np.zeros(8), [[7, 3], [7, 3, 0, 0]], epochs=1, rate=1e-9, seed=0)
    assert nothing[0] != pytest.approx(nothing[1], abs=1e-9)  # a real token is no padding


def test_the_records_of_the_target_are_found_by_either_learner_and_gain(llama_folder):
    near = [
        Record("chat", (Message("user", f"Which lamp is {i}?"), Message("assistant", f"The red lamp {i} is on.")))
        for i in range(10)
    ]
    far = [Record("chat", (Message("user", f"Say {i}."), Message("assistant", "zebra quartz " * (1 + i % 3)))) for i in range(10)]
    made = pool(llama_folder, near + far, target=near[:3])
    for options in ({}, {"gain": "gradient"}, {"optimiser": "adamw", "learning_rate": 1e-3}):
        signals = InformationGain(count=6, measured=20, objective=3, **options).score(made)
        assert np.isfinite(signals["gain"]).all() and signals["gain"][:10].mean() > signals["gain"][10:].mean()
        assert signals["foretold gain"][:10].mean() > signals["foretold gain"][10:].mean()
    few = InformationGain(count=6, measured=8, objective=2, learner="convolution", epochs=2).score(made)
    assert np.isfinite(few["gain"]).sum() == 8 and np.isfinite(few["foretold gain"]).all() and np.ptp(few["foretold gain"]) > 0
