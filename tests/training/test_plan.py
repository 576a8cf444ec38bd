"""What a run will take, told before it: counts to the unit, operations to the last one, memory and time plausibly."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import selectune
from selectune import catalogue, cli, pipeline
from selectune import recipe as recipes
from selectune.data import pack
from selectune.errors import EXIT_OVER_BUDGET, UserError
from selectune.meter import Meter
from selectune.models import Anatomy
from selectune.recipe import BudgetRecipe, TrainingRecipe
from selectune.training import Passes, Trainable, calibrate, train
from selectune.training import memory as memories
from selectune.training.memory import GIB, STATES, Footprint, Memory, divisors, memory_problem, micro_batch
from selectune.training.predict import passes_ahead
from tests.test_mistakes import lines, put
from tests.tiny import tiny
from tests.training.test_training import encoded

ROWS = [{"question": f"Which lamp belongs to fault {i}?", "answer": f"Lamp {i * 7 % 50} left."} for i in range(60)]
VALUES = {
    "form": "full", "parameters": "last_blocks:k=2", "data": {"max_length": 128},
    "training": {"epochs": 3, "batch_sequences": 4, "evaluations": 3},
    "evaluation": {"target": "off", "samples": 0, "benchmarks": [], "forgetting": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, llama_folder):
    folder = tmp_path_factory.mktemp("plan")
    put(folder, "data.jsonl", lines(ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELECTUNE_CACHE", str(folder / "cache"))
        yield folder, {**VALUES, "base": str(llama_folder), "output": str(folder / "runs"), "data": {
            **VALUES["data"], "train": str(folder / "data.jsonl")}}  # fmt: skip


def half_trained(blocks=2):
    model = tiny("llama").requires_grad_(False)
    for block in Anatomy.of(model).blocks[-blocks:]:
        model.get_submodule(block.prefix).requires_grad_(True)
    return model


OBJECTIVE = catalogue.create("objectives", "cross_entropy")


@pytest.mark.parametrize("records, micro, batch, steps, evaluations", [
    (12, 1, 2, 9, 3), (12, 2, 4, 7, 2), (11, 4, 4, 9, 0), (5, 3, 6, 5, 2), (3, 4, 4, 6, 4),
])  # fmt: skip
@pytest.mark.parametrize("packing", [True, False])
def test_passes_ahead_are_those_of_the_run(packing, records, micro, batch, steps, evaluations, tmp_path):
    recipe = TrainingRecipe(batch_sequences=batch, micro_batch_sequences=micro, evaluations=evaluations, epochs=50)
    model, meter = half_trained(), Meter("train")
    rows, dev = (pack(encoded(count, seed), 64, packing) for count, seed in ((records, 0), (3, 9)))
    made = Trainable(model, rows, dev, OBJECTIVE, bfloat16=False, folder=tmp_path, seed=5)
    ahead = passes_ahead(made, recipe, steps)
    result = train(made, recipe, steps=steps, learning_rate=1e-3, meter=meter, quiet=True)
    assert ahead.cost.backward_tokens == meter.cost.backward_tokens
    assert ahead.cost.forward_tokens == meter.cost.forward_tokens
    assert ahead.known == result.skipped_tokens
    assert result.skipped_tokens > 0 or not packing or len(rows) < micro
    assert ahead.checkpoints >= 1


def test_the_plan_of_a_run_is_what_the_run_was(place):
    folder, values = place
    before = sorted(folder.rglob("*"))
    plan = selectune.plan(recipe=values, quiet=True)
    assert [path for path in sorted(folder.rglob("*")) if path not in before and "cache" not in path.parts] == []
    run = pipeline.specialize(recipe=values, quiet=True, name="ran")
    train_cost = next(cost for cost in run.costs() if cost.stage == "train")
    tokens = json.loads(run.path("data.json").read_text())["tokens"]
    scores = json.loads(run.path("scores.json").read_text())
    assert (plan.trained_parameters, plan.total_parameters) == (scores["trained_parameters"], scores["total_parameters"])
    assert plan.trained_parameters == sum(
        value.numel() for value in load_file(run.path("specialist", "changed.safetensors")).values()
    )
    assert (plan.sequences, plan.tokens, plan.response_tokens) == (tokens["sequences"], tokens["all"], tokens["response"])
    assert plan.steps == json.loads(run.path("plan.json").read_text())["steps"] and plan.epochs == 3
    assert plan.flops == train_cost.flops and plan.training_tokens == train_cost.backward_tokens
    assert plan.memory_measured and 0.75 < plan.memory_bytes / train_cost.peak_memory_bytes < 1.25
    assert 0.2 < plan.seconds / train_cost.seconds < 5  # tiny, on a machine that may be busy
    assert plan.problems == [] and plan.steps_in_budget == plan.steps


def test_choosing_is_charged_and_rehearsed(place):
    _, values = place
    few = selectune.plan(recipe=values, quiet=True, parameters="fisher_blocks:k=2,examples=2")
    many = selectune.plan(recipe=values, quiet=True, parameters="fisher_blocks:k=2,examples=40")
    assert few.notes == [] and "6 examples instead of 40" in many.notes[0]
    assert many.seconds_of_choosing > few.seconds_of_choosing > 0
    assert many.parameters["examples"] == 40 and many.trained_parameters == few.trained_parameters


def test_a_calibration_leaves_the_weights_alone(tmp_path):
    model = half_trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = pack(encoded(12), 64)
    for optimiser in typing.get_args(TrainingRecipe.model_fields["optimiser"].annotation):
        recipe = TrainingRecipe(batch_sequences=2, micro_batch_sequences=1, optimiser=optimiser, weight_decay=0.1)
        made = Trainable(model, rows, rows[:2], OBJECTIVE, bfloat16=False, folder=tmp_path, seed=0)
        found = calibrate(made, recipe, seconds=0.0)
        assert found.token > 0 and found.step > 0 and found.evaluated > 0 and found.checkpoint > 0
        assert found.seconds(Passes(20, 0, 0, 0, 0, 2), 10) > found.seconds(Passes(10, 0, 0, 0, 0, 1), 5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(tmp_path.iterdir()) == [] and all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize("policy", ["bursts:every=2,steps=2,buffer=4", "refresh:every=2", "zeroth_order", "sharpness"])
def test_a_policy_acts_in_the_calibration_and_the_run_starts_at_the_base_all_the_same(policy, place, monkeypatch):
    _, values = place
    name = policy.partition(":")[0]
    policy = {"method": "refresh", "parameters": "fisher_blocks:k=2,examples=4", "every": 2} if name == "refresh" else policy
    method, acted = catalogue.methods("policies")[name], []
    own = method.begin
    monkeypatch.setattr(method, "begin", lambda self, stage: (acted.append(1), own(self, stage))[1])
    assert selectune.plan(recipe=values, quiet=True, policy=policy).seconds > 0 and len(acted) == 1
    training = {"evaluations": 0, "batch_sequences": 2, "learning_rate": 1e-3}
    timed = pipeline.specialize(recipe=values, quiet=True, name=f"{name}-timed", policy=policy,
                                training={**training, "epochs": 3}, budget={"minutes": 30})  # fmt: skip
    plain = pipeline.specialize(
        recipe=values, quiet=True, name=f"{name}-plain", policy=policy, training={**training, "epochs": 3}
    )
    assert len(acted) == 4
    spent = [next(cost for cost in run.costs() if cost.stage == "train") for run in (timed, plain)]
    assert len({(cost.forward_tokens, cost.backward_tokens) for cost in spent}) == 1  # trying it out is no cost of the training
    one, other = (load_file(run.path("specialist", "changed.safetensors")) for run in (timed, plain))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_budget_in_minutes_shortens_the_run_and_the_plan_says_so(place):
    _, values = place
    plan = selectune.plan(recipe=values, quiet=True, training={"epochs": 4000, "evaluations": 0}, budget={"minutes": 0.1})
    assert 0 < plan.steps_in_budget < plan.steps and plan.seconds > 6
    (problem,) = plan.problems
    assert f"after {plan.steps_in_budget} of {plan.steps:,}".replace(",", "") in problem and "budget.minutes" in problem
    assert "training.epochs" in problem
    run = pipeline.specialize(recipe=values, quiet=True, name="minutes", training={"epochs": 4000, "evaluations": 0},
                              budget={"minutes": 0.1})  # fmt: skip
    planned = json.loads(run.path("plan.json").read_text())
    assert 0 < planned["steps"] < plan.steps and planned["seconds"] <= 6


FOOTPRINT = Footprint(trained=100 << 20, held=100 << 20, adapter=1 << 20, weights=512 << 20, frozen_weights=256 << 20, fixed=0,
                      saved_by={}, sequence=1 << 30, recomputed=100 << 20, logits=0, prefix=0, length=512)  # fmt: skip


@pytest.mark.parametrize("budget, recipe, wanted", [
    (9.0, {}, None),
    (5.2, {}, "training.micro_batch_sequences: 2 "),
    (3.8, {}, "training.micro_batch_sequences: 1 "),
    (3.5, {"micro_batch_sequences": 1}, "training.gradient_checkpointing: true "),
    (2.2, {"micro_batch_sequences": 1, "gradient_checkpointing": True}, "training.optimiser: adamw_8bit "),
    (1.35, {"micro_batch_sequences": 1, "gradient_checkpointing": True, "optimiser": "adafactor"}, "form: lora "),
    (0.1, {}, "no setting of this one fits"),
])  # fmt: skip
def test_a_run_that_does_not_fit_is_refused_with_what_would(budget, recipe, wanted):
    settings = TrainingRecipe(**{"micro_batch_sequences": 4, **recipe})
    problem = memory_problem(FOOTPRINT, settings, BudgetRecipe(memory_gib=budget), settings.micro_batch_sequences)
    if wanted is None:
        assert problem is None
        return
    assert "training needs about" in str(problem) and f"the budget is {budget:.2f} GiB" in str(problem) and wanted in str(problem)
    key, _, value = str(problem).rpartition("to mend it: set ")[2].partition(" (")[0].partition(": ")
    if key.startswith("training."):
        recipes.parse({"training": {key.removeprefix("training."): __import__("yaml").safe_load(value)}})


def test_what_is_advised_fits(monkeypatch):
    settings = TrainingRecipe(micro_batch_sequences=4)
    changes = list(FOOTPRINT.smaller(settings, 4))
    assert all(isinstance(memory, Memory) and memory.total < FOOTPRINT.at(settings, 4).total for _, memory in changes)
    assert set(STATES) == set(typing.get_args(TrainingRecipe.model_fields["optimiser"].annotation))


def test_a_run_is_refused_before_its_first_step(place):
    _, values = place
    with pytest.raises(UserError, match=r"budget\.memory_gib.*training needs about .* GiB .* budget is 0\.20") as caught:
        pipeline.specialize(recipe=values, quiet=True, name="refused", budget={"memory_gib": 0.2})
    assert caught.value.field == "budget.memory_gib"
    assert not (Path(values["output"]) / "refused" / "checkpoints").exists()


def footprint(blocks, dev=(), policy="none", **training):
    rows, made = pack(encoded(12), 64), catalogue.create("policies", policy)
    made = Trainable(half_trained(blocks), rows, [*dev], OBJECTIVE, bfloat16=False, folder=None, seed=0, policy=made)
    return Footprint.of(made, TrainingRecipe(**training))


def test_activations_are_counted():
    rows = pack(encoded(12), 64)
    one, two, four = (footprint(k, prefix_cache=False) for k in (1, 2, 4))
    assert 0 < one.sequence < two.sequence < four.sequence and two.recomputed < two.sequence
    assert two.sequence - one.sequence == pytest.approx(one.sequence, rel=0.2)
    assert footprint(2, prefix_cache=False) == two
    kept = footprint(2, rows[:3])
    assert kept.prefix == (len(rows) + 3) * 64 * 64 * 4


def test_what_a_policy_holds_is_counted():
    def at(policy):
        return footprint(2, policy=policy).at(TrainingRecipe(), 1)

    plain, spider, refresh = at("none"), at("spider"), at("refresh")
    assert spider.gradients == 3 * plain.gradients and refresh.weights == 2 * plain.weights
    assert dataclasses.replace(spider, gradients=plain.gradients) == plain == dataclasses.replace(refresh, weights=plain.weights)
    one, drawn = at("layer_sampling:blocks=1"), at("layer_sampling:blocks=1,by=fisher")
    assert 2 * one.gradients == plain.gradients == drawn.gradients and 2 * one.optimiser == plain.optimiser == drawn.optimiser
    assert at("bi_drop:passes=4").gradients == 7 * plain.gradients and at("zeroth_order").gradients == 0


def test_the_micro_batch_found_is_the_largest_that_fits(monkeypatch):
    def auto(batch, gib, **changes):
        footprint = dataclasses.replace(FOOTPRINT, length=128)
        return micro_batch(
            footprint,
            TrainingRecipe(batch_sequences=batch, micro_batch_sequences="auto", **changes),
            BudgetRecipe(memory_gib=gib),
        )

    assert divisors(12) == [1, 2, 4] and divisors(1) == [1] and divisors(8) == [1, 2, 4, 8]
    assert [auto(8, gib) for gib in (100, 7.9, 5.4, 1)] == [8, 4, 2, 1]
    assert auto(12, 100) == 4 and auto(64, 1000) == memories.AUTO_TOKENS // 128
    assert auto(8, 1, gradient_checkpointing=True) == 1
    monkeypatch.setattr(memories, "_total", lambda: 15.8 * GIB)
    assert auto(8, None) == 4  # of half of the machine, however much of it is free now


def test_a_micro_batch_is_a_number_or_auto():
    assert recipes.parse({"training": {"micro_batch_sequences": "auto"}}).training.micro_batch_sequences == "auto"
    for wrong in (0, "many"):
        with pytest.raises(UserError, match="micro_batch_sequences"):
            recipes.parse({"training": {"micro_batch_sequences": wrong}})


def test_the_micro_batch_found_survives_a_resume(place, monkeypatch):
    from selectune.training import Interrupted
    from selectune.training.progress import EndAtStep

    folder, values = place
    values = pipeline.merge(values, {"training": {"micro_batch_sequences": "auto", "epochs": 2}})
    whole = pipeline.specialize(recipe=values, quiet=True, name="auto-whole")
    assert json.loads(whole.path("plan.json").read_text())["micro_batch_sequences"] == 4
    step_end = EndAtStep.on_step_end

    def press(self, args, state, control, **kwargs):
        self.asked = self.asked or state.global_step == 3
        step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(EndAtStep, "on_step_end", press)
        with pytest.raises(Interrupted, match="step 3"):
            pipeline.specialize(recipe=values, quiet=True, name="auto-stopped")
    monkeypatch.setattr(memories, "AUTO_TOKENS", 128)  # asked again, it would be 1
    resumed = pipeline.resume(folder / "runs" / "auto-stopped", quiet=True)
    one, other = (load_file(run.path("specialist", "changed.safetensors")) for run in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_command_line_plans(place, monkeypatch):
    folder, values = place
    file = folder / "recipe.yaml"
    file.write_text(recipes.dump(recipes.parse(values)))
    monkeypatch.setenv("COLUMNS", "80")
    run = CliRunner().invoke(cli.app, ["plan", str(file), "--quiet"])
    assert run.exit_code == 0 and "Plan of the training" in run.output
    for word in ("73,984 parameters", "43.18%", "last_blocks:k=2", "tokens/s", "GiB", "not included"):
        assert word in run.output
    assert max(map(len, run.output.splitlines())) <= 80
    over = CliRunner().invoke(cli.app, ["plan", "--recipe", str(file), "--memory-gib", "0.2", "--json"])
    assert over.exit_code == EXIT_OVER_BUDGET
    assert "budget.memory_gib" in json.loads(over.output[over.output.index("{") :])["problems"][0]
