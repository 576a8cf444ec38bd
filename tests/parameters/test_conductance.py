"""Conductance along the way from masked to full input: complete where it must be, and the order of tokens decides as it says."""

import pytest
import torch
from torch import nn

from selectune import catalogue
from selectune.models import load_base
from selectune.parameters.conductance import conductance
from selectune.parameters.factors.gradients import first, rows_of
from tests.contracts.test_parameters import context


def method(**values):
    return catalogue.create("parameters", {"method": "conductance", "examples": 1, "steps": 3, **values})


def test_where_the_loss_is_linear_it_adds_up_to_the_change_of_the_loss():
    torch.manual_seed(0)
    layer, along = nn.Linear(4, 3), torch.randn(3)
    points = [torch.randn(2, 4) for _ in range(6)]
    found = conductance({"layer": layer}, [lambda x=x: (layer(x.requires_grad_()) @ along).sum() for x in points])
    with torch.no_grad():
        change = (layer(points[-1]) @ along).sum() - (layer(points[0]) @ along).sum()
    assert float(found["layer"].sum()) == pytest.approx(float(change), rel=1e-4)


def test_one_step_is_the_gradient_at_the_end_times_the_change():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    start, end = torch.randn(2, 4), torch.randn(2, 4)
    found = conductance({"0": net[0]}, [lambda x=x: net(x.requires_grad_()).square().sum() for x in (start, end)])
    inner = net[0](end).detach().requires_grad_()
    net[2](net[1](inner)).square().sum().backward()
    assert torch.allclose(found["0"], inner.grad * (net[0](end) - net[0](start)).detach(), atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_path_ends_at_the_full_input_and_masks_half_at_its_beginning(architecture, tiny_folders):
    base = load_base(tiny_folders[architecture])
    asked = context(base)
    row = rows_of(asked, first(asked.train, 1))[0]
    shown = []
    entry = base.model.get_input_embeddings()
    empty = entry(torch.arange(entry.weight.shape[0])).mean(0).detach()
    base.model.base_model.get_submodule(base.anatomy.blocks[0].prefix.split(".", 1)[1]).register_forward_pre_hook(
        lambda module, inputs: shown.append(inputs[0].detach().clone())
    )
    losses = [one().detach() for one in method()._passes(asked, row, empty)]
    with torch.no_grad():
        odds = base.model(input_ids=row["input_ids"][None]).logits[0, :-1].log_softmax(-1)
        told = row["labels"][1:]
        full = sum(odds[i, t] for i, t in enumerate(told.tolist()) if t != -100)
    assert float(losses[-1]) == pytest.approx(float(full), rel=1e-4)
    whole = shown[-1][0]  # of the model's own pass
    length = len(row["input_ids"])
    hidden = [int((states[0] != whole).any(-1).sum()) for states in shown[:4]]
    assert hidden == [length - -(-length // 2), length - -(-length * 2 // 3), length - -(-length * 5 // 6), 0]


def test_a_constant_surprise_gives_the_random_order_and_another_one_rules_it(llama_folder, monkeypatch):
    base = load_base(llama_folder)
    kind = type(method())
    modules = [name for block in base.anatomy.blocks for name in block.linears]
    plain = method().scores(context(base), modules)
    monkeypatch.setattr(kind, "surprisal", lambda self, asked, row: torch.ones(len(row["input_ids"])))
    assert method(order="adaptive").scores(context(base), modules) == plain
    monkeypatch.setattr(kind, "surprisal", lambda self, asked, row: torch.arange(len(row["input_ids"])).float())
    ordered = method(order="adaptive").scores(context(base), modules)
    assert ordered != plain == method().scores(context(base), modules)
    assert ordered == method(order="adaptive").scores(context(base, seed=5), modules)  # nothing is left to chance


def test_scores_do_not_depend_on_the_order_of_modules_and_the_best_share_trains(llama_folder):
    base = load_base(llama_folder)
    modules = [name for block in base.anatomy.blocks for name in block.linears]
    scores = method().scores(context(base), modules)
    assert method().scores(context(base), modules[::-1]) == pytest.approx(scores)
    chosen = method(ratio=0.25).select(context(base))
    assert chosen.names() == sorted(f"{name}.weight" for name in sorted(modules, key=lambda name: -scores[name])[:7])
    blocks = method(unit="block", ratio=0.5).select(context(base))
    assert len({name.split(".")[2] for name in blocks.names()}) == 2 and len(blocks.names()) == 18
