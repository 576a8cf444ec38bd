"""Clients' blocks against brute force, and the limits of the penalty."""

import itertools

import pytest
import torch

from selectune import catalogue
from selectune.data import Message, Record
from selectune.models import load_base
from selectune.parameters.factors.gradients import first
from selectune.parameters.federated_layers import averaging_weights, objective, solve
from tests.contracts.test_parameters import context


def gains(seed, clients=3, layers=5):
    return torch.rand(clients, layers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(of, masks, penalty):
    """The objective, slowly."""
    total = float((masks * of).sum())
    for one, other in itertools.combinations(masks, 2):
        total -= penalty * float((one - other).square().sum())
    return total


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("penalty", [0.0, 0.1, 1.0, 10.0])
def test_the_solver_is_brute_force_and_ascent_never_above_it(seed, penalty):
    of = gains(seed)
    sides = [torch.tensor(bits, dtype=torch.float64) for bits in itertools.product([0, 1], repeat=5) if sum(bits) <= 2]
    best = max(value(of, torch.stack(masks), penalty) for masks in itertools.product(sides, repeat=3))
    found = solve(of, [2, 2, 2], penalty)
    assert (found.sum(1) == 2).all()
    enumerated = solve(of, [2, 2, 2], penalty, exact=True)
    assert torch.equal(found, enumerated)
    assert value(of, enumerated, penalty) <= best + 1e-9  # what is left of a budget is filled, which may cost
    if penalty != 1.0:  # in between something may be left of a budget
        assert value(of, enumerated, penalty) == pytest.approx(best)
    climbed = solve(of, [2, 2, 2], penalty, exact=False)
    assert value(of, climbed, penalty) <= best + 1e-9
    assert float(objective(of, climbed, penalty)) == pytest.approx(value(of, climbed, penalty))


@pytest.mark.parametrize("layers", [5, 30])
def test_without_a_penalty_each_takes_its_own_and_with_a_great_one_all_the_same(layers):
    of = gains(1, 4, layers)
    own, same = solve(of, [3] * 4, 0.0), solve(of, [3] * 4, 1e6)
    for row, mask in zip(of, own, strict=True):
        assert set(mask.nonzero().squeeze(-1).tolist()) == set(row.topk(3).indices.tolist())
    assert all(set(mask.nonzero().squeeze(-1).tolist()) == set(of.sum(0).topk(3).indices.tolist()) for mask in same)


def test_weights_of_averaging_add_up_to_one_where_a_layer_trains():
    masks = torch.tensor([[1, 0, 1], [1, 0, 0]], dtype=torch.float64)
    assert averaging_weights(masks, [30, 10]).tolist() == [[0.75, 0, 1], [0.25, 0, 0]]


def test_gains_are_squared_norms_pack_by_pack_and_the_union_trains(llama_folder):
    base = load_base(llama_folder)
    method = catalogue.create("parameters", {"method": "federated_layers", "k": 1, "clients": 2, "penalty": 0})
    asked = context(base)
    clients = method.split(asked.train)
    assert [len(part) for part in clients] == [3, 3] and not set(map(id, clients[0])) & set(map(id, clients[1]))
    records = first(asked.train, 2)
    found = method.gains(asked, records)
    piece = [p for record in records for p in asked.encoder.encode(record)]
    totals = torch.zeros(4, dtype=torch.float64)
    base.model.requires_grad_(True)
    loss = count = 0  # the records fit in one pack: one pass, the mean over all its response tokens
    for one in piece:
        ids, labels = torch.tensor([one.input_ids]), torch.tensor(one.labels)
        logits = base.model(input_ids=ids).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
    (loss / count).backward()
    for block in base.anatomy.blocks:
        totals[block.index] = sum(float(base.model.get_parameter(n).grad.square().sum()) for n in block.parameters)
    assert torch.allclose(found, totals, rtol=1e-3)
    base = load_base(llama_folder)
    asked = context(base)
    chosen = method.select(asked)
    tops = {int(method.gains(asked, part).argmax()) for part in method.split(asked.train)}
    assert {int(name.split(".")[2]) for name in chosen.names()} == tops


def test_with_a_great_penalty_the_blocks_that_are_best_for_all_together_train(llama_folder):
    base = load_base(llama_folder)
    asked, method = context(base), catalogue.create("parameters", "federated_layers:k=2,clients=2,penalty=1000")
    together = sum(method.gains(asked, part) for part in method.split(asked.train))
    assert {int(name.split(".")[2]) for name in method.select(asked).names()} == set(together.topk(2).indices.tolist())


def test_files_are_clients(llama_folder):
    records = [Record("chat", (Message("user", str(i)), Message("assistant", "x")), source=f"file{i % 3}") for i in range(9)]
    method = catalogue.create("parameters", "federated_layers")
    assert [{r.source for r in part} for part in method.split(records)] == [{"file0"}, {"file1"}, {"file2"}]


def test_a_client_without_anything_to_learn_has_no_say(llama_folder):
    records = [
        Record("chat", (Message("user", "lamp " * 300 + str(i)), Message("assistant", "x")), source="unread") for i in range(3)
    ]
    base = load_base(llama_folder)
    plain, mixed = context(base), context(base)
    mixed.train = [*mixed.train, *records]
    method = catalogue.create("parameters", "federated_layers:k=1,penalty=0,by=source")
    assert method.select(mixed).names() == method.select(plain).names() and mixed.block_scores == plain.block_scores
    assert "for each of 1 clients" in mixed.notes[0]
