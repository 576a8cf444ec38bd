"""Entries are exchanged under a running optimiser, and all that ever changed is saved."""

import pytest
import torch
from transformers import TrainerCallback

from selectune.adapters import load_specialist
from selectune.catalogue import create
from selectune.errors import UserError
from selectune.meter import Meter
from selectune.models import load_base
from selectune.parameters import Context
from selectune.parameters.selection import Part, Selection
from selectune.training.policies import refresh
from tests.training.policies.running import blocks, dense, mixed, run, same

LIFT = {"method": "refresh", "parameters": {"method": "lift", "density": 0.05, "rank": 4}, "every": 2}
MATRIX = "model.layers.1.mlp.up_proj.weight"


def lift(model):
    """The first choice."""
    from types import SimpleNamespace

    from selectune.models import Anatomy

    base = SimpleNamespace(model=model, anatomy=Anatomy.of(model))
    context = Context(base, None, [], [], torch.Generator(), Meter("choose"))
    return create("parameters", LIFT["parameters"]).select(context)


class Watch(TrainerCallback):
    """The optimiser's moments and the values of one matrix, dense, after each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        module = model.model.model.layers[1].mlp.up_proj
        (trained,) = module.__dict__["_parts_that_train"].values()
        held = optimizer.state[trained.values]
        where = trained.part.mask()
        full = {}
        for key in ("exp_avg", "exp_avg_sq"):
            full[key] = torch.zeros(trained.part.shape)
            trained.part.put(full[key], held[key])
        values = trained.weight.detach().float().clone()
        trained.part.put(values, trained.values.detach())
        self.seen.append((where, full, float(held["step"]), values))


def test_what_stays_keeps_its_moments_and_what_is_new_starts_at_zero(tmp_path, llama_folder, monkeypatch):
    watch, after = Watch(), []
    plain = refresh.carry

    def spy(stage, *rest):
        plain(stage, *rest)
        value, part = stage.parameters[MATRIX], stage.parts[MATRIX]
        held = stage.optimiser.state[value]
        full = {key: torch.zeros(part.shape) for key in ("exp_avg", "exp_avg_sq")}
        for key, into in full.items():
            part.put(into, held[key])
        weight = stage.passing["weights"][MATRIX].detach().float().clone()
        part.put(weight, value.detach())
        after.append((part.mask(), full, float(held["step"]), weight))

    monkeypatch.setattr(refresh, "carry", spy)
    run(tmp_path, llama_folder, LIFT, choose=lift, watching=[watch], evaluations=0, steps=6, rate=3e-2, bfloat16=True)
    assert len(after) == 2
    for number, (where, full, step, values) in zip((1, 3), after, strict=True):
        before, held, steps, old = watch.seen[number]
        both, new = before & where, where & ~before
        assert both.any() and new.any() and (before & ~where).any()
        for key in full:
            assert torch.equal(full[key][both], held[key][both]) and held[key][both].any()
            assert not full[key][new].any()
        assert step == steps == number + 1
        assert torch.equal(values[both], old[both])  # in fp32, not rounded
        left = before & ~where
        assert torch.equal(values[left], old[left].bfloat16().float())


def test_each_choice_is_that_of_the_weights_of_the_moment(tmp_path, llama_folder):
    ran = run(tmp_path, llama_folder, LIFT, choose=lift, evaluations=0, steps=5, rate=3e-2, keep_best=False)
    changed = sum(int((ran.after[name] != ran.base[name]).sum()) for name in ran.after if name != "lm_head.weight")
    first = lift(load_base(llama_folder, dtype=torch.float32).model)
    assert changed > first.count() * 1.02  # the union grows
    assert changed == ran.result.touched.count()


def test_without_a_renewal_it_is_plain_training_and_with_all_it_is_full(tmp_path, llama_folder):
    plain = run(tmp_path / "a", llama_folder, choose=lift)
    assert same(plain.after, run(tmp_path / "b", llama_folder, {**LIFT, "every": 100}, choose=lift).after)
    full = run(tmp_path / "c", llama_folder, choose=Selection.all)
    assert same(full.after, run(tmp_path / "d", llama_folder, {"method": "refresh", "parameters": "all", "every": 2},
                                choose=Selection.all).after)  # fmt: skip
    assert not same(full.after, run(tmp_path / "e", llama_folder, {"method": "refresh", "parameters": "all", "every": 2, "carry": False},
                                    choose=Selection.all).after)  # fmt: skip


def test_what_is_saved_is_all_that_changed(tmp_path, llama_folder):
    ran = run(tmp_path, llama_folder, LIFT, choose=mixed, rate=3e-2, bfloat16=True)
    (tmp_path / "specialist").mkdir()
    create("adapters", "full").save(ran.model, ran.made, ran.result.touched, tmp_path / "specialist")
    loaded = load_specialist(load_base(llama_folder, dtype=torch.bfloat16), tmp_path / "specialist")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, ran.after[name].to(value.dtype)), name
    assert not same({name: value.to(torch.bfloat16) for name, value in ran.after.items()}, ran.base)


def test_an_earlier_checkpoint_forgets_what_was_touched_later(tmp_path, llama_folder):
    class Ruin(TrainerCallback):
        """Ruins the second half."""

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            for value in model.parameters():
                if state.global_step >= 3 and value.requires_grad:
                    value.data.mul_(-3)

    ran = run(tmp_path / "a", llama_folder, LIFT, choose=lift, keep_best=True, watching=[Ruin()], rate=1e-3)
    assert ran.result.best_step == 3
    short = run(tmp_path / "b", llama_folder, LIFT, choose=lift, steps=6, evaluations=2, rate=1e-3, watching=[Stop()])
    assert same(ran.after, short.after)


class Stop(TrainerCallback):
    """Ends after three steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 3


@pytest.mark.parametrize("parameters", ["speft:examples=4", "fishertune:examples=4", "smt:side=16,examples=4", "last_blocks:k=1"])
def test_any_method_can_choose(parameters, tmp_path, llama_folder):
    ran = run(
        tmp_path, llama_folder, {"method": "refresh", "parameters": parameters, "every": 2, "time": 2}, steps=4, evaluations=0
    )
    assert ran.result.touched.count() and not same(ran.after, ran.base)


def test_budgets_grow_with_time():
    policy = create("policies", {"method": "refresh", "parameters": "fishertune", "time": 10})
    assert policy.method(20).time == 2.0 and policy.method(20).threshold() < policy.method(0).threshold()
    assert create("policies", "refresh").for_run("lift").parameters == "lift"
    assert policy.for_run("lift").parameters == "fishertune"


def test_a_growing_choice_keeps_what_it_had():
    one, more = Part((4, 4), "elements", [1, 2]), Part((4, 4), "rows", [0])
    values = refresh._written(torch.zeros(4, 4), torch.tensor([5.0, 6.0]), one)
    assert more.take(values).tolist() == [[0.0, 5.0, 6.0, 0.0]]


def test_mistakes_are_told(tmp_path, llama_folder):
    with pytest.raises(UserError, match="adapters stay"):
        run(tmp_path / "a", llama_folder, {**LIFT, "parameters": "last_blocks:k=2"}, choose=blocks, form="lora")
    with pytest.raises(UserError, match="cannot be carried"):
        run(tmp_path / "b", llama_folder, {**LIFT, "parameters": "last_blocks:k=2"}, choose=blocks, optimiser="adafactor", steps=4,
            evaluations=0)  # fmt: skip
    assert dense(run(tmp_path / "c", llama_folder, {**LIFT, "carry": False}, choose=lift, steps=4, evaluations=0).model)


def test_scores_are_of_the_model_without_dropout(tmp_path, llama_folder, monkeypatch):
    from selectune.parameters.lift import LIFT as Lift

    seen, plain = [], Lift.select
    monkeypatch.setattr(Lift, "select", lambda self, context: seen.append(context.base.model.training) or plain(self, context))
    run(tmp_path, llama_folder, LIFT, choose=lift, evaluations=0, steps=3)
    assert seen == [False, False]  # the first choice, and one renewal
