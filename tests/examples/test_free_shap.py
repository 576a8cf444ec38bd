"""FreeShap: values against the definition, predictions against plain regression, the kernel against autograd."""

from itertools import combinations, permutations
from math import comb

import numpy as np
import pytest
import torch

from selectune.data import Message, Record
from selectune.errors import UserError
from selectune.examples.factors.empirical_kernel import empirical_kernel
from selectune.examples.factors.labels import answered, shared_labels
from selectune.examples.free_shap import ShapleyValue, accuracy, explained, likelihood, predictions, shapley_values
from tests.examples.test_signals import RECORDS, pool

LABELS = ("red", "green")


def labelled(text, answer):
    messages = (Message("user", text), Message("assistant", LABELS[answer]))
    return Record("classification", messages, choices=LABELS, answer=answer)


def problem(n, m, outputs=2, seed=0):
    generator = np.random.default_rng(seed)
    near, far = generator.normal(size=(n, 3)), generator.normal(size=(m, 3))
    direction = generator.normal(size=(3, outputs))
    return near @ near.T, far @ near.T, np.eye(outputs)[(near @ direction).argmax(1)], (far @ direction).argmax(1)


def direct(kernel, cross, wanted, some, ridge):
    inside = kernel[np.ix_(some, some)] + ridge * np.eye(len(some))
    return cross[:, some] @ np.linalg.inv(inside) @ wanted[some]


def test_every_beginning_is_a_regression_of_its_own():
    kernel, cross, wanted, _ = problem(150, 4)
    found = np.concatenate(list(predictions(kernel, cross, wanted, 0.1)))
    assert found.shape == (150, 4, 2)
    for size in (1, 2, 64, 65, 150):
        assert np.allclose(found[size - 1], direct(kernel, cross, wanted, list(range(size)), 0.1), atol=1e-6)


@pytest.mark.parametrize("kind", [accuracy, likelihood])
def test_all_orders_give_the_exact_shapley_value_and_values_add_up(kind):
    kernel, cross, wanted, answers = problem(5, 7)
    empty = 0.5 if kind is accuracy else -np.log(2)
    orders = [np.array(order) for order in permutations(range(5))]
    found = shapley_values(kernel, cross, wanted, kind(answers), empty, 0.1, orders)

    def worth(some):
        return kind(answers)(direct(kernel, cross, wanted, list(some), 0.1)[None])[0] if some else empty

    for i in range(5):
        others = [j for j in range(5) if j != i]
        exact = sum((worth((*s, i)) - worth(s)) / (5 * comb(4, k)) for k in range(5) for s in combinations(others, k))
        assert found[i] == pytest.approx(exact, abs=1e-9)
    few = shapley_values(kernel, cross, wanted, kind(answers), empty, 0.1, orders[3:5])
    assert few.sum() == pytest.approx(worth(range(5)) - empty)


def test_utilities_are_those_of_their_names():
    found = np.array([[[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]]])
    answers = np.array([0, 1, 1])
    assert accuracy(answers)(found)[0] == pytest.approx(2 / 3)
    by_torch = -torch.nn.functional.cross_entropy(torch.tensor(found[0]), torch.tensor(answers))
    assert likelihood(answers)(found)[0] == pytest.approx(float(by_torch))
    losses = np.array([2.0, 1.0, 0.5])
    assert explained(losses)(np.zeros((1, 3, 1)))[0] == 0 and explained(losses)(losses[None, :, None])[0] == 1


def test_equal_records_have_equal_values_and_wrong_labels_low_ones():
    generator = np.random.default_rng(1)
    near, far = generator.normal(size=(40, 4)), generator.normal(size=(60, 4))
    near[7] = near[3]
    true = (near[:, 0] > 0).astype(int)
    flipped = [5, 11, 20, 33]
    given = true.copy()
    given[flipped] = 1 - given[flipped]
    wanted = np.eye(2)[given]
    orders = (generator.permutation(40) for _ in range(600))
    answers = (far[:, 0] > 0).astype(int)
    values = shapley_values(near @ near.T, far @ near.T, wanted, accuracy(answers), 0.5, 0.1, orders)
    assert values[3] == pytest.approx(values[7], abs=0.25 * values.std())
    assert len(set(np.argsort(values)[:8].tolist()) & set(flipped)) >= 3


def test_the_kernel_is_one_of_gradients_of_label_likelihoods(llama_folder):
    records = [labelled(f"Lamp {i} is on.", i % 2) for i in range(4)]
    made = pool(llama_folder, records, target=records[:2])
    assert shared_labels(records) == LABELS and shared_labels([*records, RECORDS[0]]) is None
    assert answered(records[0], 1).response == "green" and answered(records[0], 0) == records[0]
    own, cross = empirical_kernel(made, records, records[:2], 2, 2048)
    assert np.allclose(own, own.T) and np.linalg.eigvalsh(own).min() > -1e-8 * own.max()
    assert np.allclose(cross, own[:2])
    first, second = (empirical_kernel(made, [answered(r, label) for r in records], records, None, 2048)[0] for label in (0, 1))
    assert np.allclose(own, (first + second) / 2)


def test_a_record_of_which_nothing_trains_has_no_value_and_comes_last(llama_folder):
    unread = Record("chat", (Message("user", "lamp " * 300), Message("assistant", "It is on.")))
    made = pool(llama_folder, [unread, *RECORDS[:4]], target=RECORDS[:2])
    choice = ShapleyValue(count=4, permutations=2, dimension=64, utility="likelihood").select(made)
    assert np.isnan(choice.signals["Shapley value"]).tolist() == [True, False, False, False, False]
    assert 0 not in choice.places and any("1 record has no finite score" in note for note in made.notes)
    assert any("no set of labels in common" in note for note in made.notes)


def test_a_target_of_which_nothing_trains_is_refused_in_one_line(llama_folder):
    unread = [labelled("lamp " * 300, 1), Record("chat", (Message("user", "lamp " * 300), Message("assistant", "It is on.")))]
    for records, target in (([labelled(f"Lamp {i} is on.", i % 2) for i in range(3)], unread[:1]), (RECORDS[:3], unread[1:])):
        with pytest.raises(UserError, match="none of the target's records"):
            ShapleyValue(count=2, permutations=2, dimension=64).select(pool(llama_folder, records, target=target))


def test_labels_and_free_answers_both_run_and_large_pools_are_refused(llama_folder):
    records = [labelled(f"Lamp {i} is on.", i % 2) for i in range(8)]
    for some in (records, RECORDS):
        for utility in ("accuracy", "likelihood"):
            made = pool(llama_folder, some, target=some[:3])
            method = ShapleyValue(count=3, permutations=4, dimension=128, utility=utility)
            assert len(method.select(made).places) == 3 and np.ptp(method.score(made)["Shapley value"]) > 0
    with pytest.raises(UserError, match="most"):
        ShapleyValue(count=3, most=4).select(pool(llama_folder, records, target=records[:2]))
