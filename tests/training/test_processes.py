"""Two processes train to the weights of one, resume, end together and tell their mistakes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from selectune.errors import UserError
from selectune.meter import Cost
from selectune.models import load_base
from selectune.pipeline import specialize
from selectune.run import Run, Stage
from selectune.training import processes
from tests.test_mistakes import lines, put

ROWS = [{"question": f"Which lamp belongs to fault {i}?", "answer": f"Lamp {i * 7 % 50}."} for i in range(90)]


def recipe(tmp_path, base, **values):
    put(tmp_path, "data.jsonl", lines(ROWS))
    training = {"epochs": 1, "batch_sequences": 2, "micro_batch_sequences": 1, "precision": "float32", "evaluations": 2}
    training |= values.pop("training", {})
    return {
        "base": str(base), "output": str(tmp_path / "runs"), "form": "full", "parameters": "last_blocks:k=2",
        "data": {"train": str(tmp_path / "data.jsonl"), "max_length": 64, "test_fraction": 0.1, "packing": True, "limit": 75},
        "evaluation": {"target_items": 4, "samples": 1, "max_new_tokens": 4, "benchmarks": [], "forgetting": False},
        "training": training, **values,
    }  # fmt: skip


def weights(run):
    return load_file(run.path("specialist", "changed.safetensors"))


def apart(one, other, base):
    """How far two specialists are from each other, in units of their distance from the base."""
    start = dict(load_base(base).model.named_parameters())
    first, second = weights(one), weights(other)
    moved = sum(float((value - start[name]).pow(2).sum()) for name, value in first.items())
    return (sum(float((value - second[name]).pow(2).sum()) for name, value in first.items()) / moved) ** 0.5


def launch(file, name, tmp_path, count=2):
    """Start the command line in several processes, as torch's launcher does."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "selectune.cli",
         "specialize", "--recipe", str(file), "--name", name, "--quiet"],
        env={**os.environ, "SELECTUNE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["last_blocks:k=2", "all"])
def test_two_processes_train_to_the_weights_of_one(choice, tmp_path, llama_folder, monkeypatch):
    monkeypatch.setenv("SELECTUNE_CACHE", str(tmp_path / "cache"))
    given = recipe(tmp_path, llama_folder, parameters=choice)
    one = specialize(recipe=given, name="one", quiet=True)
    given["training"]["processes"] = 2
    two = specialize(recipe=given, name="two", quiet=True)
    assert apart(one, two, llama_folder) < 1e-3
    data = json.loads(one.path("data.json").read_text())["tokens"]
    assert data["sequences"] % 2 == 0, "an epoch's last batch must be full for the comparison"
    costs = [run.read("stages/train.json", Stage).cost for run in (one, two)]
    assert costs[0].forward_tokens == costs[1].forward_tokens and costs[0].backward_tokens == costs[1].backward_tokens
    assert costs[1].flops == pytest.approx(costs[0].flops, rel=0.15)
    logged = [[json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    assert [line["step"] for line in logged[0]] == [line["step"] for line in logged[1]]
    for a, b in zip(*logged, strict=True):
        assert a.get("eval_loss", 0) == pytest.approx(b.get("eval_loss", 0), abs=1e-3)
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sharpness", "zeroth_order:sparsity=0.5"])
def test_policies_with_passes_of_their_own_act_alike_in_two_processes(policy, tmp_path, llama_folder, monkeypatch):
    monkeypatch.setenv("SELECTUNE_CACHE", str(tmp_path / "cache"))
    given = recipe(tmp_path, llama_folder, policy=policy, training={"max_steps": 8, "evaluations": 0, "learning_rate": 1e-4})
    one = specialize(recipe=given, name="one", quiet=True)
    given["training"]["processes"] = 2
    assert apart(one, specialize(recipe=given, name="two", quiet=True), llama_folder) < 1e-3


@pytest.mark.slow
def test_a_launcher_s_processes_share_the_whole_chain(tmp_path, llama_folder, monkeypatch):
    monkeypatch.setenv("SELECTUNE_CACHE", str(tmp_path / "cache"))
    given = recipe(tmp_path, llama_folder)
    one = specialize(recipe=given, name="one", quiet=True)
    child = launch(put(tmp_path, "recipe.yaml", json.dumps(given)), "together", tmp_path)
    _, said = child.communicate(timeout=300)
    assert child.returncode == 0, said
    together = Run.open(tmp_path / "runs" / "together")
    assert together.finished("report")
    assert apart(one, together, llama_folder) < 1e-3


@pytest.mark.slow
def test_killed_processes_end_together_and_resume_to_the_same_weights(tmp_path, llama_folder, monkeypatch):
    monkeypatch.setenv("SELECTUNE_CACHE", str(tmp_path / "cache"))
    given = recipe(tmp_path, llama_folder, training={"processes": 2, "epochs": 2, "save_steps": 8, "evaluations": 2})
    file = put(tmp_path, "recipe.yaml", json.dumps(given))
    whole = specialize(recipe=given, name="whole", quiet=True)
    command = [sys.executable, "-m", "selectune.cli", "specialize", "--recipe", str(file), "--name", "killed", "--quiet"]
    child = subprocess.Popen(command, env={**os.environ}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "runs" / "killed"
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/checkpoint-*/complete")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    left, deadline = "there", time.monotonic() + 30  # workers look for their parent every second, on a busy machine later
    while left and time.monotonic() < deadline:
        time.sleep(0.5)
        left = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True).stdout
    assert not left, "a worker outlived the run that started it"
    from selectune.pipeline import resume

    for name, value in weights(resume(folder, quiet=True)).items():
        assert torch.equal(value, weights(whole)[name]), name


@pytest.mark.slow
def test_a_worker_s_mistake_is_the_user_s_one_line(tmp_path, llama_folder, monkeypatch):
    monkeypatch.setenv("SELECTUNE_CACHE", str(tmp_path / "cache"))
    given = recipe(tmp_path, llama_folder, training={"processes": 2, "learning_rate": 1e30, "warmup_fraction": 0.0})
    with pytest.raises(UserError, match="the loss became") as told:
        specialize(recipe=given, quiet=True)
    assert told.value.field == "training.learning_rate"


def test_no_other_program_can_take_the_port_of_the_processes(tmp_path, monkeypatch):
    answered = []

    class Child:
        returncode = 0

        def __init__(self, command, env, **options):
            with socket.create_connection((env["MASTER_ADDR"], int(env["MASTER_PORT"])), timeout=5):
                answered.append(env["RANK"])

        def poll(self):
            return 0

        kill = wait = poll

    monkeypatch.setattr(subprocess, "Popen", Child)
    processes.start(Run(tmp_path), 2, quiet=True)
    assert answered == ["0", "1"]


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch, tmp_path, llama_folder):
    monkeypatch.setenv("SELECTUNE_CACHE", str(tmp_path / "cache"))
    given = recipe(tmp_path, llama_folder, training={"processes": 3})
    with pytest.raises(UserError, match="shared by 3 processes"):
        specialize(recipe=given, quiet=True)


class Together:
    """Stands for what several processes gather."""

    def __init__(self, other, kind="MULTI_CPU"):
        self.other, self.distributed_type = other, type("Kind", (), {"value": kind})

    def gather(self, sums):
        return torch.cat([sums, sums + self.other])


def test_processes_that_drifted_apart_are_refused(llama_folder):
    from selectune.training.trainer import _check_alike

    model = load_base(llama_folder).model.requires_grad_(True)
    _check_alike(Together(0.0), model)
    _check_alike(Together(1e-6, "FSDP"), model)
    with pytest.raises(UserError, match="drifted apart"):
        _check_alike(Together(1e-6), model)


def test_costs_of_processes_add_up():
    one = Cost(stage="train", seconds=3, forward_tokens=5, peak_memory_bytes=7)
    both = one.plus(Cost(stage="train", seconds=2, forward_tokens=10, flops=4.0, peak_memory_bytes=1))
    assert (both.seconds, both.forward_tokens, both.flops, both.peak_memory_bytes) == (3, 15, 4.0, 8)


def test_alone_there_is_nobody_to_wait_for():
    processes.wait()
    assert processes.first() and processes.count() == 1 and processes.agree(3) == 3 and not processes.any_of(False)
