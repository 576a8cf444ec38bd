"""Signals on a cluster of two workers: the values of one process, whatever was killed on the way. Left out where Ray is not installed."""

import json
import os
import pickle
import signal as signals
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import selectune
from selectune.data import Encoder
from selectune.errors import UserError
from selectune.examples import Pool
from selectune.examples.factors import store
from selectune.examples.factors.cluster import packed
from selectune.examples.factors.signals import ResponseLoss, Signal
from selectune.examples.factors.store import measure
from selectune.models import load_base
from tests.contracts.test_examples import RECORDS

pytest.importorskip("ray", reason="Ray is not installed: pip install 'selectune[ray]'")


class Noted(Signal):
    """The length of a question; every look at a record is noted in a folder, for workers are other processes."""

    shown = "noted lengths"
    needs_base = False
    folder: str
    fails: str = ""

    def settings(self):
        return {}

    def measure(self, worker, records):
        for record in records:
            if self.fails and self.fails in record.question:
                raise RuntimeError("this machine is out of order")
            with (Path(self.folder) / record.key).open("a") as file:
                file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        return np.array([float(len(record.question)) for record in records])


@pytest.fixture(scope="module")
def cluster():
    """Two workers on this machine."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def pool(llama_folder, folder=None, engine="ray"):
    place = str(llama_folder)
    return Pool(RECORDS, lambda: load_base(place), lambda words: Encoder(words, 128), folder=folder, quiet=True, engine=engine)


def looks(folder):
    return {file.name: file.read_text().split() for file in folder.iterdir()}


@pytest.mark.slow
def test_the_cluster_measures_what_one_process_does(cluster, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BATCH", 4)
    there, here = pool(llama_folder), pool(llama_folder, engine="local")
    far, near = measure(there, ResponseLoss()), measure(here, ResponseLoss())
    np.testing.assert_allclose(far, near, rtol=1e-5)
    assert there.meter.cost.forward_tokens == here.meter.cost.forward_tokens > 0
    assert "base" not in vars(there)  # no base was loaded in this process
    far = measure(pool(llama_folder, tmp_path / "there"), ResponseLoss())
    assert (
        measure(pool(llama_folder, tmp_path / "there", "local"), ResponseLoss()).tolist() == far.tolist()
    )  # what is kept is anyone's


def test_a_model_in_memory_does_not_travel_and_measures_here(llama_folder):
    made = pool(llama_folder)
    signal, load_base, *_ = pickle.loads(packed(made, ResponseLoss()))
    assert signal == ResponseLoss() and load_base().fingerprint == made.base.fingerprint
    loaded, local = made.base, measure(pool(llama_folder, engine="local"), ResponseLoss())
    for other in (made.of(RECORDS), replace(made, load_base=lambda: loaded)):
        assert packed(other, ResponseLoss()) is None
        assert measure(other, ResponseLoss()).tolist() == local.tolist()
    assert made.notes == ["loss of responses: measured in this process, by a model that no other machine can load"]


def test_a_cluster_without_a_processor_is_one_line(llama_folder, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    with pytest.raises(UserError, match="no processor"):
        measure(pool(llama_folder), ResponseLoss())


@pytest.mark.slow
def test_both_workers_work_and_what_was_kept_is_not_measured_again(cluster, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BATCH", 2)
    monkeypatch.setattr(store, "SECONDS", 0)
    noted = tmp_path / "noted"
    noted.mkdir()
    plain, parts = store._write, []

    def killed(*arguments):
        if len(parts) == 3:
            raise KeyboardInterrupt
        parts.append(arguments)
        plain(*arguments)

    monkeypatch.setattr(store, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(pool(llama_folder, tmp_path / "kept"), Noted(folder=str(noted)))
    kept = {str(key, "ascii") for _, keys, _, batches, _ in parts for batch in batches for key in keys[batch]}
    assert len(kept) == 6
    before = looks(noted)
    monkeypatch.setattr(store, "_write", plain)
    found = measure(pool(llama_folder, tmp_path / "kept"), Noted(folder=str(noted)))
    assert found.tolist() == [len(record.question) for record in RECORDS]
    after = looks(noted)
    assert all(after[key] == before[key] for key in kept) and len(after) == len(RECORDS)
    assert len({worker for workers in after.values() for worker in workers}) >= 2


@pytest.mark.slow
def test_a_worker_that_fails_is_one_line(cluster, llama_folder, tmp_path):
    with pytest.raises(UserError, match="out of order") as error:
        measure(pool(llama_folder), Noted(folder=str(tmp_path), fails="fault 3"))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_choosing_on_the_cluster_is_choosing_here(cluster, llama_folder, tmp_path):
    file = tmp_path / "pool.jsonl"
    rows = [{"question": f"What is fault {i}?", "answer": "lamp " * (i % 7 + 1) + str(i)} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = [
        selectune.choose_examples(str(file), "loss", count=8, base=str(llama_folder), quiet=True, engine=engine)
        for engine in ("local", "ray")
    ]
    assert [record.key for record in chosen[0].records] == [record.key for record in chosen[1].records]
    with pytest.raises(UserError, match="local or ray"):
        selectune.choose_examples(str(file), "loss", base=str(llama_folder), engine="cloud")


@pytest.mark.slow
def test_a_recipe_may_name_the_engine(cluster, llama_folder, tmp_path):
    file = tmp_path / "pool.jsonl"
    file.write_text("".join(json.dumps({"question": f"What is {i}?", "answer": f"lamp {i}"}) + "\n" for i in range(60)))
    values = {"base": str(llama_folder), "form": "full", "training": {"max_steps": 1, "evaluations": 0, "batch_sequences": 2},
              "evaluation": {"benchmarks": [], "forgetting": False, "samples": 0, "target_items": 4}, "output": str(tmp_path)}  # fmt: skip
    runs = [
        selectune.specialize(
            str(file), examples="loss:count=6", recipe=values | {"data": {"engine": engine}}, name=engine, quiet=True
        )
        for engine in ("local", "ray")
    ]
    assert runs[0].path("data", "chosen.jsonl").read_text() == runs[1].path("data", "chosen.jsonl").read_text()


KILLED = """
import sys
from tests.examples import test_cluster as here
from selectune.examples.factors import store
store.BATCH, store.SECONDS = 1, 0
folder = here.Path(sys.argv[1])
here.measure(here.pool("", folder / "kept"), here.Noted(folder=str(folder / "noted")))
"""


@pytest.mark.slow
def test_killed_half_way_it_goes_on(tmp_path, monkeypatch):
    """Kill -9 of the process that asked; its cluster goes with it."""
    (tmp_path / "noted").mkdir()
    going = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"})
    parts = tmp_path / "kept" / "signals"
    for _ in range(2400):
        if len(list(parts.rglob("part-*.parquet"))) >= 3:
            break
        time.sleep(0.1)
    going.send_signal(signals.SIGKILL)
    going.wait()
    known = len(list(parts.rglob("part-*.parquet")))
    assert 3 <= known < len(RECORDS)
    time.sleep(2)
    before = looks(tmp_path / "noted")
    monkeypatch.setattr(store, "BATCH", 1)
    found = measure(pool("", tmp_path / "kept", "local"), Noted(folder=str(tmp_path / "noted")))
    assert found.tolist() == [len(record.question) for record in RECORDS]
    after = looks(tmp_path / "noted")
    assert sum(len(after[key]) - len(before.get(key, [])) for key in after) == len({r.key for r in RECORDS}) - known
