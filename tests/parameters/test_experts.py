"""ESFT and RouterLens, the faithful-if lines of their cards, on tiny mixtures and on one made of a dense base."""

from types import SimpleNamespace

import pytest
import torch

from selectune import catalogue
from selectune.data import Encoder
from selectune.errors import UserError
from selectune.meter import Meter
from selectune.models import load_base
from selectune.models.upcycle import upcycle, upcycled
from selectune.parameters import Context, Selection, router_lens
from selectune.parameters.esft import prefix
from selectune.parameters.factors.routing import router_of, routing, selection_of, without_experts
from selectune.parameters.router_lens import causal_check
from tests.contracts.test_forms_and_parameters import RECORDS, logits, train_a_little
from tests.tiny import save_tiny, tiny

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_tiny(name, tmp_path_factory.mktemp(name)) for name in MIXTURES}


def context(base, seed=0):
    return Context(
        base, Encoder(base.tokenizer, 128), RECORDS, RECORDS[:3], torch.Generator().manual_seed(seed), Meter("choose"), quiet=True
    )


def by_hand(base, records):
    """Gate weights and tokens of each expert, from the router's own weights and the states that reach it."""
    states, active = {}, 2
    handles = [
        base.model.get_submodule(router_of(base.model, block)).register_forward_pre_hook(
            lambda module, inputs, block=block.index: states.setdefault(block, []).append(inputs[0].reshape(-1, 64))
        )
        for block in base.anatomy.blocks
    ]
    for record in records:
        (piece,) = Encoder(base.tokenizer, 128).encode(record)
        with torch.no_grad():
            base.model(input_ids=torch.tensor([piece.input_ids]))
    for handle in handles:
        handle.remove()
    gates = {block: [0.0] * 4 for block in states}
    counts = {block: [0] * 4 for block in states}
    for block in base.anatomy.blocks:
        weight = base.model.get_submodule(router_of(base.model, block)).weight
        normed = base.model.config.model_type == "mixtral" or base.model.config.norm_topk_prob
        for state in torch.cat(states[block.index]):
            probabilities = (weight @ state).softmax(-1)
            best = sorted(range(4), key=lambda e: -probabilities[e])[:active]
            whole = sum(probabilities[e] for e in best) if normed else 1
            for expert in best:
                gates[block.index][expert] += float(probabilities[expert] / whole)
                counts[block.index][expert] += 1
    return gates, counts


@pytest.mark.parametrize("name", MIXTURES)
def test_routing_is_what_each_token_was_given(name, folders):
    base = load_base(folders[name])
    gates, counts = routing(context(base), RECORDS[:3])
    expected_gates, expected_counts = by_hand(base, RECORDS[:3])
    tokens = sum(len(Encoder(base.tokenizer, 128).encode(record)[0].input_ids) for record in RECORDS[:3])
    for block in range(4):
        assert counts[block].tolist() == expected_counts[block]
        assert counts[block].sum() == tokens * 2
        assert gates[block].tolist() == pytest.approx(expected_gates[block], rel=1e-4)


def test_the_prefix_is_the_shortest_that_reaches_the_share():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        shares = torch.rand(6, generator=generator, dtype=torch.float64)
        shares /= shares.sum()
        for p in (0.1, 0.4, 0.9):
            chosen = prefix(shares, p)
            order = sorted(range(6), key=lambda e: (-shares[e], e))
            fewest = next(n for n in range(1, 7) if sum(shares[e] for e in order[:n]) >= p)
            assert chosen == sorted(order[:fewest])
    assert prefix(torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64), 1.0) == [0, 2, 3]
    assert prefix(torch.tensor([0.25] * 4, dtype=torch.float64), 0.5) == [0, 1]


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("relevance", ["gate", "token"])
def test_esft_takes_the_experts_that_the_data_uses(name, relevance, folders):
    base = load_base(folders[name])
    selection = catalogue.create("parameters", f"esft:examples=3,p=0.6,relevance={relevance}").select(context(base))
    first = sorted(RECORDS, key=lambda record: record.key)[:3]
    totals = by_hand(base, first)[0 if relevance == "gate" else 1]
    for block in base.anatomy.blocks:
        shares = [value / sum(totals[block.index]) for value in totals[block.index]]
        order = sorted(range(4), key=lambda e: (-shares[e], e))
        fewest = next(n for n in range(1, 5) if sum(shares[e] for e in order[:n]) >= 0.6)
        for key in block.parameters:
            chosen = sorted(order[:fewest]) if key in block.expert_parameters else []
            assert (selection.parts[key].index.tolist() if selection.covers(key) else []) == chosen, key


def test_all_of_the_routing_is_every_expert_that_gets_any(folders):
    base = load_base(folders["mixtral"])
    selection = catalogue.create("parameters", "esft:p=1").select(context(base))
    _, counts = routing(context(base), RECORDS)
    for block in base.anatomy.blocks:
        used = (counts[block.index] > 0).nonzero().squeeze(-1)
        assert all(torch.equal(selection.parts[key].index, used) for key in block.expert_parameters)


def test_where_every_expert_is_chosen_they_train_as_their_whole_stacks_do(folders):
    some, whole = load_base(folders["qwen3_moe"]), load_base(folders["qwen3_moe"])
    selection = catalogue.create("parameters", "esft:p=1").select(context(some))
    stacks = Selection.of(whole.model, [key for block in whole.anatomy.blocks for key in block.expert_parameters])
    assert selection == stacks
    for base, chosen in ((some, selection), (whole, stacks)):
        model = catalogue.create("adapters", "full").apply(base, chosen, 0)
        train_a_little(model, base)
        logits(model)  # writes the entries
    one, other = some.model.state_dict(), whole.model.state_dict()
    assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in selection.names())


@pytest.mark.parametrize("method", ["esft", "router_lens:steps=2"])
def test_only_the_chosen_experts_train(method, folders):
    base = load_base(folders["mixtral"])
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    selection = catalogue.create("parameters", method).select(context(base))
    model = catalogue.create("adapters", "full").apply(base, selection, 0)
    train_a_little(model, base)
    model(input_ids=torch.arange(9)[None])  # writes the entries
    changed = 0
    for key, value in before.items():
        now = model.state_dict()[key]
        mask = selection.mask(key) if selection.covers(key) else torch.zeros_like(value, dtype=torch.bool)
        assert torch.equal(now[~mask], value[~mask]), key
        changed += int((now != value).sum())
    assert changed
    assert all(base.model.get_submodule(router_of(base.model, block)).weight.grad is None for block in base.anatomy.blocks)


def test_tuning_routers_changes_routers_and_nothing_else(folders):
    base = load_base(folders["mixtral"])
    tuned = catalogue.create("parameters", "router_lens:steps=3,learning_rate=0.01").tuned(context(base))
    routers = {f"{router_of(base.model, block)}.weight" for block in base.anatomy.blocks}
    differ = {key for key, value in base.model.named_parameters() if not torch.equal(value, tuned.model.get_parameter(key))}
    assert differ == routers


def test_router_lens_counts_with_the_tuned_routers(folders):
    base = load_base(folders["mixtral"])
    method = catalogue.create("parameters", "router_lens:steps=10,learning_rate=0.1,experts=1")
    selection = method.select(context(base))
    tuned = method.tuned(context(base))
    _, counts = routing(context(base), RECORDS, tuned.model)
    expected = {block.index: [int(max(range(4), key=lambda e: (counts[block.index][e], -e)))] for block in base.anatomy.blocks}
    assert selection == selection_of(base.model, base.anatomy, expected)
    _, untuned = routing(context(base), RECORDS)
    assert any(not torch.equal(counts[block], untuned[block]) for block in counts)
    everything = catalogue.create("parameters", "router_lens:steps=2,experts=4").select(context(base))
    assert everything.count() == sum(base.anatomy.sizes[key] for block in base.anatomy.blocks for key in block.expert_parameters)
    with pytest.raises(UserError, match="a block has 4"):
        catalogue.create("parameters", "router_lens:experts=5").select(context(base))


def test_of_experts_that_get_as_many_tokens_the_first_are_taken(folders, monkeypatch):
    base = load_base(folders["mixtral"])
    counts = {0: [3.0, 5.0, 3.0, 5.0], 1: [4.0, 4.0, 4.0, 4.0], 2: [1.0, 2.0, 2.0, 2.0], 3: [0.0, 0.0, 0.0, 1.0]}
    monkeypatch.setattr(router_lens, "routing", lambda *_: ({}, {block: torch.tensor(one) for block, one in counts.items()}))
    method = catalogue.create("parameters", "router_lens:experts=3")
    found = method.skilled(context(base), SimpleNamespace(model=base.model))
    assert found == {0: [0, 1, 3], 1: [0, 1, 2], 2: [1, 2, 3], 3: [0, 1, 3]}


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_are_switched_off_get_no_token(name, folders):
    base = load_base(folders[name])
    plain = base.model(input_ids=torch.arange(20)[None]).logits
    with without_experts(base.model, base.anatomy, {1: [0, 2]}):
        _, counts = routing(context(base), RECORDS)
        assert not torch.allclose(base.model(input_ids=torch.arange(20)[None]).logits, plain, atol=1e-3)
    assert counts[1][0] == counts[1][2] == 0 < counts[0].min()
    assert torch.equal(base.model(input_ids=torch.arange(20)[None]).logits, plain)
    with pytest.raises(UserError, match="fewer than 2"), without_experts(base.model, base.anatomy, {1: [0, 1, 2]}):
        pass


def test_the_causal_check_measures_all_three(folders):
    base = load_base(folders["mixtral"])
    losses = causal_check(context(base), base.model, {block: [0, 1] for block in range(4)})
    assert len(set(losses.values())) == 3
    assert causal_check(context(base), base.model, {}) == pytest.approx(dict.fromkeys(losses, losses["plain"]))


def test_a_dense_base_is_refused(llama_folder):
    for method in ("esft", "router_lens"):
        with pytest.raises(UserError, match="no experts"):
            catalogue.create("parameters", method).select(context(load_base(llama_folder)))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_equal_experts_compute_what_the_dense_base_does(kind):
    model = tiny(kind)
    ids = torch.arange(3, 40)[None]
    made = upcycled(model, experts=4, jitter=0.0, router=1.0)
    assert torch.allclose(made(input_ids=ids).logits, model(input_ids=ids).logits, atol=2e-4, rtol=1e-5)
    noisy = upcycled(model, experts=4, jitter=0.01)
    assert not torch.allclose(noisy(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-3)
    assert torch.equal(noisy(input_ids=ids).logits, upcycled(model, experts=4, jitter=0.01)(input_ids=ids).logits)
    with pytest.raises(UserError, match="cannot be active"):
        upcycled(model, experts=2, active=3)


def test_an_upcycled_base_is_a_base_like_any_other(llama_folder, tmp_path):
    base = load_base(upcycle(load_base(llama_folder), tmp_path, experts=3, jitter=0.05))
    assert base.anatomy.blocks[0].experts == 3
    assert catalogue.create("parameters", "esft:p=0.5").select(context(base)).count() > 0
    with pytest.raises(UserError, match="same attention"):
        upcycled(tiny("gpt2"))
