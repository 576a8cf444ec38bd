"""An experiment on a tiny base: exact budgets, resumed to the same cells, nothing done twice, failures told, the page."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

import selectune
from selectune.data import Message
from selectune.errors import UserError
from selectune.examples.method import Choice as ExampleChoice
from selectune.examples.random import RandomExamples
from selectune.experiment import jobs
from selectune.experiment.budget import Facts
from selectune.experiment.plan import Plan
from selectune.experiment.protocol import load
from selectune.experiment.runner import Job, Runner
from selectune.experiment.store import Choice, Store
from selectune.models import load_base
from selectune.parameters.factors.scores import SCORES, find
from tests.test_mistakes import lines, put

ROWS = [{"question": f"Which lamp belongs to fault {i}?", "answer": f"Lamp {i * 7 % 50}."} for i in range(90)]
METHODS = [
    {"name": "gradient", "parameters": "scored:score=gradient,examples=2",
     "claim": {"text": "a gradient knows", "better_than": "random", "on": "gain"}},
    {"name": "two blocks", "parameters": "fisher_blocks:k=2,examples=2"},
    {"name": "too many blocks", "parameters": "last_blocks:k=9"},
    {"name": "explodes", "parameters": "random", "learning_rates": [1e-2, 1e38], "training": {"clip_norm": None, "optimiser": "sgd"}},
]  # fmt: skip


def write(folder, base, name="e.yaml", **changes):
    put(folder, "data.jsonl", lines(ROWS))
    values = {
        "name": "small", "base": str(base), "data_root": str(folder), "output": str(folder / "runs"),
        "tasks": {"lamps": {"train": "data.jsonl", "test_fraction": 0.2, "train_records": 30, "test_records": 8}},
        "methods": METHODS, "controls": {"last_blocks": False}, "budgets": [2000], "learning_rates": [1e-3, 1e-2],
        "training": {"max_steps": 4, "batch_sequences": 2, "max_length": 64, "precision": "float32"},
    }  # fmt: skip
    return put(folder, name, yaml.safe_dump({**values, **changes}))


def pieces(folder):
    """Every finished piece of work: its file, and when it was written."""
    return {path.relative_to(folder): path.stat().st_mtime_ns for kind in ("choices", "trials", "cells")
            for path in (folder / "runs" / "small" / kind).glob("*.json")}  # fmt: skip


def cells(folder):
    found = json.loads((folder / "runs" / "small" / "page.json").read_text())
    return {(cell["method"], cell["seed"]): cell for cell in found["cells"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, llama_folder):
    folder = tmp_path_factory.mktemp("finished")
    page = selectune.experiment(write(folder, llama_folder), quiet=True)
    return folder, page.read_text()


@pytest.mark.slow
def test_budgets_are_exact_or_marked(finished):
    folder, page = finished
    found = cells(folder)
    assert found["gradient", 0]["entries"] == found["random", 0]["entries"] == 2000
    assert found["full_fine_tuning", 0]["entries"] > 100_000
    lora = found["lora", 0]
    rank = lora["recipe"]["form"]["rank"]
    assert rank == max(1, 2000 // (lora["entries"] // rank)) and lora["recipe"]["form"]["alpha"] == 2 * rank
    blocks = found["two blocks", 0]
    assert blocks["recipe"]["parameters"]["k"] == 2 and f"{blocks['entries']:,} ‡" in page
    assert "| gradient | 2,000 |" in page
    edges = [line for line in page.splitlines() if line.startswith("| ") and "(edge) |" in line]
    assert f"(edge), {len(edges)} of {len([one for one in found.values() if not one['failed']])}: the best learning rate" in page


@pytest.mark.slow
def test_the_best_learning_rate_is_that_of_the_development_loss(finished):
    for cell in cells(finished[0]).values():
        if not cell["failed"]:
            worked = {float(rate): loss for rate, loss in cell["grid"].items() if not isinstance(loss, str)}
            assert cell["learning_rate"] == min(worked, key=worked.get)


@pytest.mark.slow
def test_a_failure_is_told_and_the_rest_goes_on(finished):
    folder, page = finished
    found = cells(folder)
    assert "9 blocks are asked for" in found["too many blocks", 0]["failed"]
    assert "- too many blocks, lamps, 2,000 entries, seed 0: 9 blocks" in page.split("## Failed")[1]
    explodes = found["explodes", 0]
    assert not explodes["failed"] and explodes["learning_rate"] == 1e-2 and "loss" in explodes["grid"]["1e+38"]


@pytest.mark.slow
def test_costs_and_claims_are_on_the_page(finished):
    folder, page = finished
    for cell in cells(folder).values():
        if not cell["failed"]:
            assert cell["train"]["seconds"] > 0 and cell["train"]["peak_memory_bytes"] > 0 and cell["train"]["flops"] > 0
    assert cells(folder)["gradient", 0]["choose"]["forward_tokens"] > 0
    written = json.loads((folder / "runs" / "small" / "page.json").read_text())
    for one, other in zip(written["base"]["lamps"], cells(folder)["gradient", 0]["benchmarks"], strict=True):
        assert one["name"] == other["name"] and "score" in other
        if one["metric"] in ("answer_nll", "cross_entropy"):
            assert len(one["items"]) == len(other["values"]) > 0  # in the order of the base's items
            assert all(isinstance(value, int | float) for value in other["values"])
    claim = next(line for line in page.splitlines() if "a gradient knows" in line)
    assert any(f"**{verdict}**" in claim for verdict in ("reproduced", "not reproduced", "opposite"))
    assert "<svg" in next((folder / "runs" / "small").glob("*.svg")).read_text()
    assert not list((folder / "runs" / "small" / "trials").glob("*/specialist"))


@pytest.mark.slow
def test_nothing_is_done_twice_and_more_can_be_asked_for(finished, llama_folder):
    folder, _ = finished
    before = pieces(folder)
    selectune.experiment(write(folder, llama_folder), quiet=True)
    assert pieces(folder) == before
    page = selectune.experiment(write(folder, llama_folder, seeds=[0, 1]), only="random", quiet=True)
    after = pieces(folder)
    assert {path: after[path] for path in before} == before
    assert [path.parts[2] for path in sorted(after.keys() - before.keys())] == ["cells", "choices", "trials"]  # one learning rate
    assert "gradient, lamps, 2,000 entries, seed 1" in page.read_text().split("## Not run")[1]
    first, second = (cells(folder)["random", seed] for seed in (0, 1))
    assert first["learning_rate"] == second["learning_rate"] and first["benchmarks"] != second["benchmarks"]


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_cells(finished, tmp_path, llama_folder):
    file = write(tmp_path, llama_folder)
    command = [sys.executable, "-m", "selectune.cli", "experiment", file, "--quiet"]
    killed = 0
    for pause in (9.0, 7.5, 8.2):
        child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
        try:
            child.wait(timeout=pause)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            killed += 1
        time.sleep(0.1)
    assert killed
    done = pieces(tmp_path)
    assert subprocess.run(command).returncode == 0
    assert {path: when for path, when in pieces(tmp_path).items() if path in done} == done
    undisturbed, found = cells(finished[0]), cells(tmp_path)
    assert found.keys() <= undisturbed.keys()
    for place, cell in found.items():
        for key in ("failed", "entries", "learning_rate", "grid", "benchmarks", "steps"):
            assert cell[key] == undisturbed[place][key], (place, key)


@pytest.mark.slow
def test_two_workers_come_to_the_same_cells(finished, tmp_path, llama_folder):
    threads = torch.get_num_threads()
    selectune.experiment(write(tmp_path, llama_folder, seeds=[0, 1]), workers=2, quiet=True)
    found, alone = cells(tmp_path), cells(finished[0])
    assert json.loads((tmp_path / "runs" / "small" / "environment.json").read_text())["workers"] == 2
    assert found["random", 1]["learning_rate"] == found["random", 0]["learning_rate"] and not found["random", 1]["failed"]
    for (name, seed), cell in found.items():
        assert bool(cell["failed"]) == bool(alone[name, 0]["failed"]), name
        if seed == 0 and threads == 1:  # with several, one has fewer
            for key in ("failed", "entries", "learning_rate", "grid", "benchmarks", "steps"):
                assert cell[key] == alone[name, 0][key], (name, key)
    begun = sorted((path.stat().st_mtime, path.stem) for path in (tmp_path / "runs" / "small" / "trials").glob("*.json"))
    assert len(begun) == len({key for _, key in begun})


@pytest.mark.parametrize(("where", "keys", "together", "begun"), [
    ("trials", "ab", "", ["a", "b"]), ("trials", "aa", "", ["a"]), ("choices", "ab", "", ["a", "b"]), ("choices", "ab", "abc", ["abc"]),
])  # fmt: skip
def test_no_two_workers_do_one_piece(where, keys, together, begun):
    runner, running = Runner(SimpleNamespace(output="none", name="none"), workers=2), {}
    runner._bar = SimpleNamespace(doing=lambda pieces: None, finished=lambda slot: None)
    runner._piece = lambda plan, slot, missing: Job(missing.where, list(together or missing.key), None, None, None)
    plan = SimpleNamespace(next=lambda slot: SimpleNamespace(where=where, key=keys[slot]))
    assert not runner._next(plan, 0, running) and not runner._next(plan, 1, running)
    assert ["".join(job.keys) for job in running.values()] == begun


def test_the_machine_is_looked_at_by_a_process_that_ends(tmp_path):
    runner = Runner(SimpleNamespace(axis="parameters", output=str(tmp_path), name="none"))
    runner.store.folder.mkdir(parents=True)
    found = runner._machine()
    assert found["workers"] == 1 and isinstance(found["bf16_is_fast"], bool)
    runner._stopped = True
    with pytest.raises(KeyboardInterrupt):
        runner._machine()


@pytest.mark.slow
def test_ctrl_c_ends_every_worker_and_the_rest_is_done_later(tmp_path, llama_folder):
    few = {"methods": [{"name": "gradient", "parameters": "scored:score=gradient,examples=2"}], "learning_rates": [1e-3]}
    file = write(tmp_path, llama_folder, **few, training={"max_steps": 100_000, "max_length": 64})
    child = subprocess.Popen(
        [sys.executable, "-m", "selectune.cli", "experiment", file, "--quiet", "--workers", "3"],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell that runs the tests behind itself ignores it
    )
    deadline = time.monotonic() + 240
    while len(list((tmp_path / "runs" / "small" / "trials").glob("*/metrics.jsonl"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=240) == 130
    assert not list((tmp_path / "runs" / "small" / "trials").glob("*.json"))
    assert pieces(tmp_path) and all(path.parts[2] != "cells" for path in pieces(tmp_path))


@pytest.mark.slow
def test_a_process_that_dies_is_a_failure_that_can_be_retried(tmp_path, llama_folder):
    """Memory that runs out ends a process without a word: the experiment says so and goes on."""
    few = {"methods": [], "controls": {"lora": False, "full_fine_tuning": False, "last_blocks": False}, "learning_rates": [1e-3]}
    file = write(tmp_path, llama_folder, **few, training={"max_steps": 100_000, "max_length": 64})
    child = subprocess.Popen([sys.executable, "-m", "selectune.cli", "experiment", file, "--quiet"])
    trial = tmp_path / "runs" / "small" / "trials"
    import psutil

    deadline = time.monotonic() + 240
    while not list(trial.glob("*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    worker = psutil.Process(child.pid).children()[0]
    worker.children()[0].kill()
    assert child.wait(timeout=120) == 0
    assert "was killed" in cells(tmp_path)["random", 0]["failed"]
    file = write(tmp_path, llama_folder, **few)
    selectune.experiment(file, quiet=True, retry_failed=True)
    assert not cells(tmp_path)["random", 0]["failed"]


@pytest.mark.slow
def test_all_budgets_are_chosen_in_one_process_and_each_is_what_it_is_alone(tmp_path, llama_folder):
    few = {"methods": [{"name": "per neuron", "parameters": "gps:examples=2"}, "speft:examples=2"],
           "controls": dict.fromkeys(("random", "lora", "last_blocks", "full_fine_tuning"), False), "learning_rates": [1e-3]}  # fmt: skip
    found = {}
    for name, budgets in {"together": [3000, 6000, 9000], "alone": [6000]}.items():
        (tmp_path / name).mkdir()
        selectune.experiment(write(tmp_path / name, llama_folder, **few, budgets=budgets), quiet=True)
        folder = tmp_path / name / "runs" / "small"
        for file in (folder / "choices").glob("*.json"):
            choice, written = json.loads(file.read_text()), (file.with_suffix("") / "selection.safetensors").read_bytes()
            entries = choice["parameters"].get("entries") or choice["parameters"]["k"]
            found.setdefault((choice["parameters"]["method"], entries), []).append((written, choice["cost"]["forward_tokens"]))
    same = [values for values in found.values() if len(values) == 2]
    assert len(same) == 2 and all(one == other for one, other in same)
    spent = {method: {cost for (name, _), values in found.items() if name == method for _, cost in values} for method, _ in found}
    assert len(found) >= 5 and all(len(costs) == 1 and costs.pop() > 0 for costs in spent.values())


def test_a_score_is_measured_once_for_the_tries_and_all_budgets(tmp_path, llama_folder, monkeypatch):
    method = {"name": "per neuron", "parameters": "gps:examples=2"}
    protocol = load(write(tmp_path, llama_folder, methods=[method], budgets=[3000, 6000]))
    base = load_base(llama_folder, dtype="float32")
    facts = Facts(fingerprint="x", total_parameters=base.anatomy.total_parameters, blocks=[1], bfloat16=False)
    plan = Plan(protocol, facts, Store(tmp_path / "store"))
    jobs.prepare(protocol.tasks["lamps"], plan.data("lamps"), tmp_path / "data")
    measure, asked, kept = find("gradient"), [], {}
    monkeypatch.setitem(SCORES, "gradient", lambda *given: asked.append(given) or measure(*given))
    first, *others = [slot for slot in plan.slots() if slot.line.name == "per neuron"]
    together = plan.together(first)
    assert [one.budget for one in together.values()] == [3000, 6000] and len(others) == 1
    entries = [jobs.choose(plan.recipe(one), tmp_path / "data", base, tmp_path / key, plan.fitted(one), None, kept).entries
               for key, one in together.items()]  # fmt: skip
    assert len(asked) == 1 and 1500 < entries[0] <= 3000 < entries[1] <= 6000
    plan.store.write("choices", list(together)[1], Choice())
    assert list(plan.together(first).values()) == [first]  # what is done is not done again


def test_a_record_that_a_choice_changes_is_kept_as_what_it_was(tmp_path, llama_folder, monkeypatch):
    def answered_anew(self, pool):
        anew = [replace(record, messages=(record.messages[0], Message("assistant", "None."))) for record in pool.records]
        return ExampleChoice(self.fill(pool, pool.order, pool.of(anew)), records=anew)

    monkeypatch.setattr(RandomExamples, "choose", answered_anew)
    pool = {"sources": [{"train": "data.jsonl", "records": 20}], "in_domain": 10, "wrong_answers": 0.2}
    task = {"train": "data.jsonl", "test_fraction": 0.2, "dev_fraction": 0.1, "test_records": 8, "pool": pool}
    given = {"axis": "examples", "form": "lora:rank=2", "tasks": {"lamps": task}, "methods": [], "budgets": [0.9]}
    protocol = load(write(tmp_path, llama_folder, **given))
    base = load_base(llama_folder, dtype="float32")
    facts = Facts(fingerprint="x", total_parameters=base.anatomy.total_parameters, blocks=[1], bfloat16=False)
    plan = Plan(protocol, facts, Store(tmp_path / "store"))
    jobs.prepare(
        protocol.tasks["lamps"], plan.data("lamps"), tmp_path / "data", protocol.tasks["lamps"].pool_under(str(tmp_path))
    )
    slot = next(slot for slot in plan.slots() if slot.line.name == "random")
    found = jobs.choose(plan.recipe(slot), tmp_path / "data", base, tmp_path / "room", plan.fitted(slot))
    assert found.kept["wrong answer"] > 0.5 and found.kept["in domain"] > 0.5


def test_choices_made_in_one_process_share_what_they_measure(tmp_path, llama_folder, monkeypatch):
    protocol = load(write(tmp_path, llama_folder, budgets=[3000, 6000]))
    runner, begun = Runner(protocol, quiet=True), []
    runner.base, facts = None, Facts(fingerprint="x", total_parameters=10**6, blocks=[1], bfloat16=False)
    monkeypatch.setattr(Runner, "_begin", lambda self, where, works, *rest: begun.append(works))
    plan = Plan(protocol, facts, runner.store)
    slot = next(slot for slot in plan.slots() if slot.line.name == "gradient")
    runner._piece(plan, slot, plan.next(slot))
    one, other = (work.args for work in begun[0].values())
    assert one[-1] is other[-1] and one[-1] == {} and one[3] != other[3]


@pytest.mark.slow
def test_mistakes_are_told(tmp_path, llama_folder):
    file = write(tmp_path, llama_folder)
    with pytest.raises(UserError, match=r"no method 'gradent'.*did you mean 'gradient'"):
        selectune.experiment(file, only="gradent")
    with pytest.raises(UserError, match="nothing was run yet"):
        selectune.experiment(file, page_only=True)
    missing = write(tmp_path, llama_folder, "missing.yaml", tasks={"lamps": {"train": "nothing.jsonl"}})
    with pytest.raises(UserError, match=r"nothing\.jsonl"):
        selectune.experiment(missing, quiet=True)
    page = selectune.experiment(file, minutes=0, quiet=True)
    assert "Nothing was run yet" in page.read_text() and "gradient, lamps" in page.read_text().split("## Not run")[1]


@pytest.mark.slow
def test_a_method_may_choose_its_records(tmp_path, llama_folder):
    lines_ = [{"name": "longest", "examples": "longest:count=6", "parameters": "all"}]
    controls = {"random": False, "lora": False, "last_blocks": False}
    selectune.experiment(write(tmp_path, llama_folder, methods=lines_, controls=controls, learning_rates=[1e-3]), quiet=True)
    found = cells(tmp_path)
    longest, every = found["longest", 0], found["full_fine_tuning", 0]
    assert longest["recipe"]["examples"]["count"] == 6 and every["recipe"]["examples"]["method"] == "all"
    assert longest["entries"] == every["entries"]
    assert [len(file.read_text().splitlines()) for file in (tmp_path / "runs" / "small").rglob("choices/*/chosen.jsonl")] == [6]
    kept = {"choices", "trials"}
    assert all(len(list((tmp_path / "runs" / "small" / kind).glob("*.json"))) == 2 for kind in kept)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory, llama_folder):
    """An experiment on ways of choosing examples, with a pool."""
    folder = tmp_path_factory.mktemp("chosen")
    put(
        folder,
        "general.jsonl",
        lines([{"question": f"Name number {i}.", "answer": f"{i} is a number, and so is {i * 3}."} for i in range(60)]),
    )
    pool = {
        "sources": [{"train": "general.jsonl", "records": 40}],
        "in_domain": 20,
        "wrong_answers": 0.2,
        "exact_duplicates": 0.1,
    }
    task = {"train": "data.jsonl", "test_fraction": 0.2, "dev_fraction": 0.1, "test_records": 8, "pool": pool}
    values = {
        "axis": "examples", "form": "lora:rank=2", "tasks": {"lamps": task}, "budgets": [0.3], "learning_rates": [1e-3],
        "controls": {"random_seeds": [0, 1, 2]}, "methods": [
            {"name": "loss", "claim": {"text": "hard is good", "better_than": "random", "on": "gain"}}, "nearest",
            {"name": "six", "examples": "longest:count=6"}, {"name": "slow", "examples": "s2l:steps=4000"},
        ], "choosing_minutes": 0.25,
    }  # fmt: skip
    page = selectune.experiment(write(folder, llama_folder, **values), quiet=True)
    return folder, page.read_text()


@pytest.mark.slow
def test_examples_are_chosen_within_a_budget_of_tokens(chosen):
    found = cells(chosen[0])
    pool = found["every_record", 0]
    assert pool["records"] == 60 + 6 and set(pool["kept"].values()) == {1.0}
    for name in ("random", "longest", "loss", "nearest"):
        assert 0.25 * pool["tokens"] < found[name, 0]["tokens"] <= 0.3 * pool["tokens"] + 1, name
        assert found[name, 0]["recipe"]["form"]["method"] == "lora"
        assert (
            found[name, 0]["train"]["backward_tokens"] == pool["train"]["backward_tokens"]
        )  # equal training, whatever was chosen
    assert found["six", 0]["records"] == 6 and found["nearest", 0]["choose"]["seconds"] > 0
    assert "not done after 0.25 minutes" in found["slow", 0]["failed"]


@pytest.mark.slow
def test_random_examples_are_a_band(chosen):
    folder, page = chosen
    found = cells(folder)
    assert [seed for name, seed in found if name == "random"] == [0, 1, 2] and ("loss", 1) not in found
    assert (
        len({found["random", seed]["tokens"] for seed in (0, 1, 2)} | {str(found["random", seed]["kept"]) for seed in (0, 1, 2)})
        > 2
    )
    assert "| wrong answer kept |" in page and "with 3 seeds" in page and "66 records (" in page
    claim = next(line for line in page.splitlines() if "hard is good" in line)
    against = next(line for line in page.splitlines() if line.startswith("| loss | random |"))
    assert against.split(" | ")[2] in claim  # the claim is decided by the band
    assert "<svg" in next((folder / "runs" / "small").glob("*-band.svg")).read_text()


@pytest.mark.slow
def test_the_page_is_written_again_from_its_json_alone(chosen, tmp_path):
    folder, page = chosen
    there = tmp_path / "runs" / "small"
    there.mkdir(parents=True)
    (there / "page.json").write_bytes((folder / "runs" / "small" / "page.json").read_bytes())
    file = put(tmp_path, "e.yaml", (folder / "e.yaml").read_text().replace(str(folder / "runs"), str(tmp_path / "runs")))
    assert selectune.experiment(file, page_only=True, quiet=True).read_text() == page
    assert cells(tmp_path) == cells(folder)
