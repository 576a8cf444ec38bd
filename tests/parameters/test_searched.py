"""Methods that try selections: the tried ones are those of the paper, and the best of them is what trains."""

import pytest

from selectune import catalogue
from selectune.errors import UserError
from selectune.models import load_base
from selectune.parameters import Selection
from selectune.parameters.cofitune import BOTH, children
from selectune.parameters.factors.gradients import each_gradient, first, rows_of
from selectune.parameters.factors.roles import weights_by_role
from selectune.parameters.factors.search import Trials
from tests.contracts.test_parameters import context

FAST = {"steps": 2, "examples": 4, "learning_rate": 1e-2}


def made(name, **values):
    return catalogue.create("parameters", {"method": name, **values})


@pytest.fixture
def base(llama_folder):
    return load_base(llama_folder)


@pytest.fixture
def told(monkeypatch):
    """Instead of training, a selection is worth what a function says; the list holds what was asked."""
    asked = []

    def tell(worth):
        monkeypatch.setattr(Trials, "__call__", lambda self, selection: asked.append(selection) or worth(selection))
        return asked

    return tell


def blocks_in(selection):
    return tuple(sorted({int(name.split(".")[2]) for name in selection.names()}))


def test_a_profile_is_each_block_alone_and_the_greedy_set_is_the_best_of_the_table(base, told):
    worth = {
        (): 0,
        (0,): 1,
        (1,): 3,
        (2,): 2,
        (3,): 0,
        (0, 1): 2,
        (1, 2): 2.9,
        (1, 3): 4,
        (0, 1, 3): 3,
        (1, 2, 3): 3.5,
        (0, 1, 2, 3): 9,
    }
    asked = told(lambda selection: worth.get(blocks_in(selection), 0))
    choosing = context(base)
    chosen = made("subtuning", candidates=4, slack=0.1).select(choosing)
    assert blocks_in(chosen) == (1, 3) and choosing.block_scores == {0: 1, 1: 3, 2: 2, 3: 0}
    assert [blocks_in(one) for one in asked] == [(), (0,), (1,), (2,), (3,), (0, 1), (1, 2), (1, 3), (0, 1, 3), (1, 2, 3)]
    assert blocks_in(made("subtuning", candidates=4, slack=9).select(context(base))) == (0, 1, 2, 3)  # goes on to the end
    assert blocks_in(made("subtuning", candidates=4, slack=0.1, rule="gain", most=1).select(context(base))) == (1,)
    assert blocks_in(made("subtuning", candidates=4, direction="remove").select(context(base))) == (0, 1, 2, 3)
    assert chosen == Selection.of(base.model, [n for i in (1, 3) for n in base.anatomy.blocks[i].parameters])


def test_halves_of_blocks_and_prefiltered_candidates(base, told):
    told(lambda selection: len(selection.names()))
    chosen = made("subtuning", unit="half", candidates=8, most=2).select(context(base))
    assert chosen == weights_by_role(base, "attention", blocks=[0, 1])  # four tensors each, three in an MLP; ties by index


@pytest.mark.parametrize(("whole", "goes_on"), [(1, [(1, 2, 3), (0, 2, 3)]), (-1, [(0,), (1,)])])
def test_a_search_either_way_starts_from_the_better_of_all_and_nothing(whole, goes_on, base, told):
    asked = told(lambda selection: whole if blocks_in(selection) == (0, 1, 2, 3) else -0.5 if selection.parts else 0)
    made("subtuning", candidates=4, direction="auto").select(context(base))
    assert [blocks_in(one) for one in asked][:4] == [(0, 1, 2, 3), (), *goes_on]


def test_a_search_either_way_with_a_single_trial_takes_what_was_tried(base, told):
    asked = told(lambda selection: 1)
    chosen = made("subtuning", candidates=4, direction="auto", trials=1).select(context(base))
    assert blocks_in(chosen) == (0, 1, 2, 3) and len(asked) == 1


def test_the_promising_units_have_the_largest_mean_squared_gradients(base):
    asked, squares = context(base), {}
    selections = made("subtuning", unit="half").units(asked)

    def add(name, gradient, tokens):
        squares[name] = squares.get(name, 0.0) + float((gradient / tokens).square().sum())

    names = {name for one in selections for name in one.names()}
    each_gradient(base.model, rows_of(asked, first(asked.train, 64), packed=True), names, add)
    means = [sum(squares[name] for name in one.names()) / one.count() for one in selections]
    for count in (2, 5):
        tried = made("subtuning", unit="half", candidates=count).promising(asked, selections)
        assert tried == sorted(sorted(range(8), key=means.__getitem__)[-count:])


def test_the_search_for_a_place_tries_every_place_and_takes_the_best(base, told):
    worth = {(1, "up"): 5.0, (3, "down"): 6.0}
    places = {}
    asked = told(
        lambda selection: worth.get((blocks_in(selection)[0], selection.names()[0].split(".")[-2].removesuffix("_proj")), 0.0)
    )
    chosen = made("locft", every=1, modules="up/down").select(context(base))
    assert chosen.names() == ["model.layers.3.mlp.down_proj.weight"] and len(asked) == 8
    two = made("locft", every=2, modules="up/down/block", places=2).select(context(base))
    assert two.names() == ["model.layers.1.mlp.up_proj.weight", "model.layers.3.mlp.down_proj.weight"]
    asked.clear()
    places = made("locft", block=2).select(context(base))
    assert places.names() == ["model.layers.2.mlp.down_proj.weight"] and not asked
    with pytest.raises(UserError, match="the base has 4"):
        made("locft", block=4).select(context(base))


def test_a_whole_block_is_tried_at_a_tenth_of_the_rate_of_a_matrix(base, monkeypatch):
    rates = {}
    monkeypatch.setattr(Trials, "__call__", lambda self, tried: float(rates.setdefault(len(tried.parts), self.learning_rate)))
    made("locft", every=2, modules="down/block").select(context(base))
    assert rates == {1: 5e-4, len(base.anatomy.blocks[0].parameters): pytest.approx(5e-5)}


def test_the_tree_goes_from_halves_to_quarters_to_modules(base, told):
    def worth(selection):
        return {(0, 1): 1, (1, 2): 3, (2, 3): 2, (1,): 4, (2,): 1}[blocks_in(selection)] + (
            "up_proj" in str(selection.names())
        ) * ("q_proj" not in str(selection.names()))

    asked = told(worth)
    chosen = made("cofitune").select(context(base))
    assert [blocks_in(one) for one in asked] == [(0, 1), (1, 2), (2, 3), (1,), (2,), (1,), (1,)]
    assert chosen.names() == ["model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    assert (
        children((0.25, 0.5, BOTH)) == [(0.25, 0.5, "query+key+value"), (0.25, 0.5, "up+down")]
        and children((0.25, 0.5, "up")) == []
    )
    asked.clear()
    assert made("cofitune", band="0.25-0.5").select(context(base)) == chosen and not asked
    with pytest.raises(UserError, match="no band"):
        made("cofitune", band="0.5").select(context(base))


def test_evolved_codes_stand_for_their_weights_and_the_best_enumerable_one_is_found(base, told):
    method = made("nfts", groups=2, finalists=1, population=4, generations=6)
    choosing = context(base)
    assert method.decode(choosing, (0, 0)) == Selection({})
    everything = weights_by_role(base, "linear")
    assert method.decode(choosing, (3, 3)) == everything
    assert method.decode(choosing, (1, 2)) == weights_by_role(base, "attention", blocks=[0, 1]) | weights_by_role(
        base, "mlp", blocks=[2, 3]
    )
    wanted = method.decode(choosing, (2, 1))
    told(lambda selection: 0.5 * selection.covers("model.layers.0.mlp.up_proj.weight") - abs(selection.count() - wanted.count()))
    found = method.select(context(base))
    assert found == wanted


def test_finalists_are_compared_after_a_longer_training(base, told):
    method = made("nfts", groups=2, finalists=16, distance=0.5, population=16, generations=0)
    asked = told(lambda selection: -selection.count())
    found = method.select(context(base))
    assert found.count() == min(one.count() for one in asked if one.parts)
    assert len(asked) > 16


@pytest.mark.parametrize("name", ["subtuning", "locft", "cofitune", "nfts"])
def test_the_budget_of_trials_is_kept_and_the_meter_runs(name, base, monkeypatch):
    calls = []
    plain = Trials.__call__
    monkeypatch.setattr(Trials, "__call__", lambda self, selection: calls.append(1) or plain(self, selection))
    asked = context(base)
    extra = (
        {"finalists": 1}
        if name == "nfts"
        else {"candidates": 4}
        if name == "subtuning"
        else {"every": 1}
        if name == "locft"
        else {}
    )
    chosen = made(name, **FAST, trials=3, **extra).select(asked)
    assert len(calls) == 3 and chosen.count() > 0
    assert asked.meter.cost.backward_tokens > 0 and asked.examples_scored == 4


def test_a_search_of_which_every_trial_diverges_is_told(llama_folder, tiny_folders):
    with pytest.raises(UserError, match="diverged"):
        catalogue.create("parameters", "cofitune:steps=3,learning_rate=1e30,examples=4").select(context(load_base(llama_folder)))
    with pytest.raises(UserError, match="stacks of experts"):
        catalogue.create("parameters", "spt:targets=mlp").select(context(load_base(tiny_folders["mixtral"])))
