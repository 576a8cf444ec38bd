"""Training: exact packing, exact loss, and a killed run that resumes to the same weights."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
import typing
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from selectune import catalogue
from selectune.data import Encoded, LikeLengths, pack, stack
from selectune.errors import UserError
from selectune.meter import Meter
from selectune.models import Anatomy
from selectune.models.head import SplitModel
from selectune.recipe import BudgetRecipe, TrainingRecipe
from selectune.training import Trainable, plan_steps, train, trainer
from tests.tiny import ARCHITECTURES, tiny


def encoded(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(3, 250, (6 + 5 * i,), generator=generator).tolist()
        made.append(Encoded(ids, [-100] * 3 + ids[3:]))
    return made


def loss(model, rows):
    split, objective = SplitModel(model), catalogue.create("objectives", "cross_entropy")
    return sum(
        objective.total(split.logits, split.hidden(input_ids=r["input_ids"][None], position_ids=r["position_ids"][None]),
                        r["labels"][None])
        for r in rows
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_losses_and_gradients_are_those_of_single_records(architecture):
    model = tiny(architecture).requires_grad_(True)
    loss(model, pack(encoded(), 64)).backward()
    packed = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    by_hand = 0
    for record in encoded():
        logits = model(input_ids=torch.tensor([record.input_ids]), use_cache=False).logits[0, :-1]
        by_hand += functional.cross_entropy(logits, torch.tensor(record.labels[1:]), ignore_index=-100, reduction="sum")
    by_hand.backward()
    for name, value in model.named_parameters():
        if value.grad is not None:
            assert torch.allclose(packed[name], value.grad, atol=2e-3, rtol=1e-3), name


def test_packing_is_exact_and_fits_best():
    records = encoded(20)
    records = [Encoded(r.input_ids[:60], r.labels[:60]) for r in records]
    rows = pack(records, 64)
    found = []
    for row in rows:
        starts = [*(row["position_ids"] == 0).nonzero().squeeze(-1).tolist(), 64]
        found += [tuple(row["input_ids"][a:b].tolist()) for a, b in pairwise(starts)]
    for record in records:
        assert tuple(record.input_ids) in found
    first_come, room = 1, 64
    for record in records:
        if len(record.input_ids) > room:
            first_come, room = first_come + 1, 64
        room -= len(record.input_ids)
    assert len(rows) <= first_come
    with pytest.raises(ValueError, match="longer"):
        pack(encoded(20), 32)


def run_training(folder, recipe=None, steps=8, model=None, packing=True, **options):
    model = model or tiny("llama")
    model.requires_grad_(False)
    model.get_submodule(Anatomy.of(model).blocks[-1].prefix).requires_grad_(True)
    recipe = recipe or TrainingRecipe(batch_sequences=2, micro_batch_sequences=1, evaluations=4)
    options = {"learning_rate": 1e-2, **options}
    rows, dev = pack(encoded(11), 64, packing), pack(encoded(3, seed=9), 64, packing)
    made = Trainable(model, rows, dev, catalogue.create("objectives", "cross_entropy"), bfloat16=False, folder=folder, seed=0)
    result = train(made, recipe, steps=steps, meter=Meter("train"), quiet=True, **options)
    return result, {name: value.clone() for name, value in model.state_dict().items()}


def test_only_what_trains_changes_and_the_best_checkpoint_is_kept(tmp_path):
    before = tiny("llama").state_dict()
    result, after = run_training(tmp_path)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all(".layers.3." in name for name in changed)
    assert result.steps == 8 and result.dev_loss is not None
    saved = load_file(tmp_path / "checkpoints" / f"checkpoint-{result.best_step}" / "trained.safetensors")
    assert all(torch.equal(after[name], value) for name, value in saved.items())


def test_the_same_seed_gives_the_same_weights(tmp_path):
    first, second = run_training(tmp_path / "a")[1], run_training(tmp_path / "b")[1]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "warmup_stable_decay"])
def test_every_schedule_runs(schedule, tmp_path):
    recipe = TrainingRecipe(batch_sequences=2, micro_batch_sequences=2, evaluations=0, schedule=schedule, warmup_fraction=0.25)
    run_training(tmp_path, recipe)
    import json

    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").open() if "learning_rate" in line]
    assert rates[0] < max(rates) <= 1e-2
    assert (rates[-1] < max(rates)) == (schedule != "constant")


OPTIMISERS = typing.get_args(TrainingRecipe.model_fields["optimiser"].annotation)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_every_optimiser_trains_and_resumes_to_the_same_weights(optimiser, tmp_path):
    recipe = TrainingRecipe(batch_sequences=2, micro_batch_sequences=2, evaluations=2, optimiser=optimiser)
    before = tiny("llama").state_dict()
    rate = {"sgd": 1e-1, "lion": 1e-3, "lion_8bit": 1e-3}.get(optimiser, 1e-2)
    _, whole = run_training(tmp_path / "whole", recipe, steps=6, learning_rate=rate)
    assert {name for name in whole if not torch.equal(whole[name], before[name])} >= {"model.layers.3.mlp.up_proj.weight"}
    assert all(torch.equal(whole[name], before[name]) for name in whole if ".layers.3." not in name)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    _, resumed = run_training(tmp_path / "cut", recipe, steps=6, learning_rate=rate)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_step_in_the_backward_pass_is_the_same_step(optimiser, tmp_path):
    settings = {"batch_sequences": 2, "micro_batch_sequences": 2, "evaluations": 0, "clip_norm": None, "optimiser": optimiser}
    models = [tiny("llama"), tiny("llama")]
    _, usual = run_training(tmp_path / "a", TrainingRecipe(**settings), model=models[0])
    _, within = run_training(tmp_path / "b", TrainingRecipe(**settings, step_in_backward=True), model=models[1])
    assert all(torch.equal(usual[name], within[name]) for name in usual)
    assert not torch.equal(
        within["model.layers.3.mlp.up_proj.weight"], tiny("llama").state_dict()["model.layers.3.mlp.up_proj.weight"]
    )


def test_a_step_in_the_backward_pass_frees_every_gradient(tmp_path, monkeypatch):
    held = []
    real = trainer._step_of_one

    def watched(optimiser, value):
        held.append(sum(p.grad is not None for group in optimiser.param_groups for p in group["params"]))
        real(optimiser, value)

    monkeypatch.setattr(trainer, "_step_of_one", watched)
    recipe = TrainingRecipe(batch_sequences=2, micro_batch_sequences=2, evaluations=0, clip_norm=None, step_in_backward=True)
    run_training(tmp_path, recipe)
    assert held and set(held) == {1}


@pytest.mark.parametrize("wrong", [{"batch_sequences": 4}, {"clip_norm": 1.0}])
def test_a_step_in_the_backward_pass_wants_one_pass_and_no_norm(wrong, tmp_path):
    values = {"batch_sequences": 2, "micro_batch_sequences": 2, "clip_norm": None, "step_in_backward": True} | wrong
    with pytest.raises(UserError, match="step_in_backward"):
        run_training(tmp_path, TrainingRecipe(**values))


def test_records_of_like_length_train_unpacked_and_resume(tmp_path):
    recipe = TrainingRecipe(batch_sequences=4, micro_batch_sequences=2, evaluations=2)
    _, whole = run_training(tmp_path / "whole", recipe, steps=6, packing=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    _, resumed = run_training(tmp_path / "cut", recipe, steps=6, packing=False)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_like_lengths_waste_little_and_visit_all():
    lengths = torch.randint(5, 300, (203,), generator=torch.Generator().manual_seed(0)).tolist()
    order = LikeLengths(lengths, batch=4, seed=1)
    first = list(order)
    assert sorted(first) == list(range(203)) and first == list(order)
    order.set_epoch(1)
    assert list(order) != first
    batches = [[lengths[n] for n in first[i : i + 4]] for i in range(0, 203, 4)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)


def test_padding_changes_no_loss():
    rows = pack(encoded(5), 64, packing=False)
    model = tiny("llama")
    batch = stack(rows)
    split, objective = SplitModel(model), catalogue.create("objectives", "cross_entropy")
    together = objective.total(
        split.logits, split.hidden(input_ids=batch["input_ids"], position_ids=batch["position_ids"]), batch["labels"]
    )
    assert torch.allclose(together, loss(model, rows), rtol=1e-4)


def test_plain_gradient_descent_is_the_textbook_step(tmp_path):
    model, rows = tiny("llama"), pack(encoded(12), 64)[:2]
    model.requires_grad_(False)
    layer = model.model.layers[-1].requires_grad_(True)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    expected = {name: value.detach() - 0.5 * value.grad for name, value in layer.named_parameters()}
    recipe = TrainingRecipe(batch_sequences=2, micro_batch_sequences=1, evaluations=0, optimiser="sgd", schedule="constant",
                            warmup_fraction=0.0, clip_norm=None)  # fmt: skip
    trained = tiny("llama").requires_grad_(False)
    trained.model.layers[-1].requires_grad_(True)
    made = Trainable(trained, rows, [], catalogue.create("objectives", "cross_entropy"), bfloat16=False, folder=tmp_path, seed=0)
    train(made, recipe, steps=1, learning_rate=0.5, meter=Meter("train"), quiet=True)
    for name, value in trained.model.layers[-1].named_parameters():
        assert torch.allclose(value, expected[name], atol=1e-5), name


def test_it_stops_early_when_the_development_loss_rises_and_keeps_the_best(tmp_path):
    recipe = TrainingRecipe(batch_sequences=2, micro_batch_sequences=2, evaluations=20, early_stop=2, schedule="constant")
    result, _ = run_training(tmp_path, recipe, steps=40, learning_rate=0.2)  # far too fast: it gets worse at once
    assert result.steps < 40 and result.best_step is not None and result.best_step < result.steps


@pytest.mark.parametrize("losses, best", [((math.nan, 3.0, 2.0, 4.0), 6), ((math.nan, math.nan, math.inf, math.nan), None)])
def test_a_development_loss_that_is_not_finite_is_never_the_best(losses, best, tmp_path, monkeypatch):
    measured, said = trainer.SelectiveTrainer.evaluation_loop, iter(losses)

    def evaluate(*given, **named):
        found = measured(*given, **named)
        return found._replace(metrics={"eval_loss": next(said)})

    monkeypatch.setattr(trainer.SelectiveTrainer, "evaluation_loop", evaluate)
    result, after = run_training(tmp_path)
    assert result.best_step == best and (result.dev_loss == 2.0 or best is None)
    saved = load_file(tmp_path / "checkpoints" / f"checkpoint-{best or 8}" / "trained.safetensors")
    assert all(torch.equal(after[name], value) for name, value in saved.items())


def test_trackers_of_the_ecosystem_are_fed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_training(tmp_path, TrainingRecipe(batch_sequences=2, micro_batch_sequences=2, report_to=["tensorboard"]), steps=2)
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_a_loss_that_is_not_finite_stops_with_a_diagnosis(tmp_path):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"nan at step 1.*layers\.1\.mlp\.up_proj.*halve the learning rate"):
        run_training(tmp_path, model=model)


@pytest.mark.parametrize("said, told", [("CUDA out of memory. Tried to allocate 2.00 GiB.", UserError),
                                        ("CUDA error: an illegal memory access was encountered", RuntimeError)])  # fmt: skip
def test_only_memory_that_is_used_up_is_told_as_that(said, told, tmp_path, monkeypatch):
    def fail(*given, **named):
        raise RuntimeError(said)

    monkeypatch.setattr(trainer.SelectiveTrainer, "training_step", fail)
    with pytest.raises(told, match="memory"):
        run_training(tmp_path)


@pytest.mark.parametrize("optimiser, policy, fits", [
    ("adamw", "none", False), ("sgd", "none", True), ("sgd", "spider", False), ("adamw", "zeroth_order", True),
])  # fmt: skip
def test_the_room_that_is_asked_for_is_that_of_the_optimiser_and_the_policy(optimiser, policy, fits, tmp_path, monkeypatch):
    model, acting = tiny("llama").requires_grad_(True), catalogue.create("policies", policy)
    weights = sum(value.numel() for value in model.parameters())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(trainer.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * weights))
    with nullcontext() if fits else pytest.raises(UserError, match="gradients and optimiser states need"):
        trainer._check_room(model, acting.settings(TrainingRecipe(optimiser=optimiser)), acting, tmp_path)


def test_plan():
    recipe = TrainingRecipe(epochs=2, batch_sequences=8)
    assert plan_steps(20, 20 * 512, recipe, BudgetRecipe()) == 6
    assert plan_steps(20, 20 * 512, recipe, BudgetRecipe(tokens=8 * 512 * 2)) == 2
    assert plan_steps(20, 20 * 512, recipe, BudgetRecipe(minutes=1), lambda steps: 20.0 * steps) == 3
    with pytest.raises(UserError, match="does not reach for one step"):
        plan_steps(20, 20 * 512, recipe, BudgetRecipe(minutes=0.1), lambda steps: 20.0 * steps)


SCRIPT = """
import pathlib, sys
sys.path.insert(0, {root!r})
import tests.conftest  # the same number of threads
from tests.training.test_training import run_training
run_training(pathlib.Path({folder!r}), steps=60, recipe=__import__("selectune.recipe").recipe.TrainingRecipe(
    batch_sequences=2, micro_batch_sequences=1, evaluations=4, save_steps=3, early_stop=None))
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_weights(tmp_path):
    root = os.getcwd()
    kills = int(os.environ.get("SELECTUNE_KILLS", "3"))
    generator = torch.Generator().manual_seed(0)
    recipe = TrainingRecipe(batch_sequences=2, micro_batch_sequences=1, evaluations=4, save_steps=3)
    _, expected = run_training(tmp_path / "undisturbed", recipe, steps=60)
    folder = tmp_path / "killed"
    folder.mkdir()
    killed = 0
    for _ in range(kills):
        child = subprocess.Popen([sys.executable, "-c", SCRIPT.format(root=root, folder=str(folder))], stderr=subprocess.DEVNULL)
        deadline = time.time() + 60
        while not (folder / "checkpoints").exists() and child.poll() is None and time.time() < deadline:
            time.sleep(0.05)
        time.sleep(float(torch.rand(1, generator=generator)) * 4)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            killed += 1
        child.wait()
    _, found = run_training(folder, recipe, steps=60)
    assert killed >= 1
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    steps = [line.split(",")[0] for line in (folder / "metrics.jsonl").open() if '"loss"' in line]
    assert len(steps) == len(set(steps)) == 60
