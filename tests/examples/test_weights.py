"""Weights of chosen records reach the loss of training."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from selectune import catalogue, pipeline
from selectune.data import Encoder, Message, Record, pack
from selectune.data.packing import repacked, stack
from selectune.data.records import records_from_file
from selectune.examples.method import Choice, ExampleMethod
from selectune.models import load_base
from selectune.objectives.cross_entropy import CrossEntropy
from selectune.training.loss import LossOfModel
from tests.test_mistakes import lines, put

RECORDS = [Record("chat", (Message("user", f"What is fault {i}?"), Message("assistant", "lamp " * (i + 1)))) for i in range(4)]
WEIGHTS = [2.0, 0.5, 1.0, 0.25]
VALUES = {
    "form": "full", "data": {"max_length": 64, "dev_fraction": 0.2}, "training": {"epochs": 1, "batch_sequences": 2, "evaluations": 1},
    "evaluation": {"target": "off", "samples": 0, "benchmarks": [], "forgetting": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(llama_folder):
    return load_base(str(llama_folder), dtype="float32")


def total(base, records, length=128, packing=True):
    """The sum of the losses of some records, as training sees them."""
    encoder = Encoder(base.tokenizer, length)
    rows = pack([piece for record in records for piece in encoder.encode(record)], length, packing)
    whole = LossOfModel(base.model, CrossEntropy(), bfloat16=False)
    with torch.no_grad(), whole.attending(rows):
        return float(whole(**stack(rows)))


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_the_weighted_one_and_a_weight_of_0_leaves_a_record_out(base, packing):
    each = [total(base, [record]) for record in RECORDS]
    weighted = [replace(record, weight=weight) for record, weight in zip(RECORDS, WEIGHTS, strict=True)]
    assert total(base, weighted, packing=packing) == pytest.approx(np.dot(each, WEIGHTS), rel=1e-4)
    one_out = [replace(RECORDS[0], weight=0.0), *RECORDS[1:]]
    assert total(base, one_out, packing=packing) == pytest.approx(sum(each[1:]), rel=1e-4)
    assert [record.key for record in weighted] == [record.key for record in RECORDS]


def test_rows_have_weights_only_where_some_record_has(base):
    encoder = Encoder(base.tokenizer, 64)
    pieces = [piece for record in RECORDS for piece in encoder.encode(record)]
    assert all("weights" not in row for row in pack(pieces, 64))
    rows = pack([*pieces[:-1], replace(pieces[-1], weight=0.25)], 64)
    assert all(row["weights"].shape == row["labels"].shape and row["weights"].dtype == torch.float32 for row in rows)
    found = {float(weight) for row in rows for weight in row["weights"][row["labels"] != -100]}
    assert found == {1.0, 0.25}


def test_records_that_are_packed_anew_within_a_step_keep_their_weights(base):
    encoder = Encoder(base.tokenizer, 128)
    pieces = [replace(encoder.encode(r)[0], weight=w) for r, w in zip(RECORDS, WEIGHTS, strict=True)]
    batch = stack(pack(pieces, 128))
    order = sorted(range(4), key=lambda n: -len(pieces[n].input_ids))  # the longest come first
    ends = np.cumsum([len(pieces[n].input_ids) for n in order]).tolist()
    again = repacked(batch, list(zip([0, *ends[:-1]], ends, strict=True))[1:3])
    kept = again["labels"] != -100
    assert sorted(set(again["weights"][kept].tolist())) == sorted(WEIGHTS[n] for n in order[1:3])


def test_a_choice_gives_each_record_its_weight_and_its_change():
    changed = [replace(record, text="anew") for record in RECORDS]
    choice = Choice(np.array([2, 0, 1]), weights=np.array([1.5, 0.0, 0.5]), records=changed)
    assert choice.as_they_train(RECORDS) == {2: replace(changed[2], weight=1.5), 1: replace(changed[1], weight=0.5)}
    assert list(choice.as_they_train(RECORDS)) == [2, 1]
    assert list(Choice(np.array([3, 1])).as_they_train(RECORDS).values()) == [RECORDS[3], RECORDS[1]]


class Weighing(ExampleMethod):
    """The first records by content, with weights."""

    weight: float = 1.0
    zeros: int = 0

    def choose(self, pool):
        places = pool.order[:12]
        weights = np.where(np.arange(12) < self.zeros, 0.0, self.weight)
        return Choice(places, weights=weights)


class Leaving(Weighing):
    """The same, without the first."""

    def choose(self, pool):
        return Choice(pool.order[self.zeros : 12])


Weighing.name, Leaving.name = "weighing", "leaving"  # only now, so that they are in no catalogue


def test_weights_of_a_method_travel_through_a_run(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTUNE_CACHE", str(tmp_path / "cache"))
    put(tmp_path, "data.jsonl", lines([{"question": f"Which lamp is {i}?", "answer": f"Lamp {i * 7 % 50}."} for i in range(60)]))
    made = {"even": Weighing(), "half": Weighing(weight=0.5), "zeros": Weighing(zeros=4), "out": Leaving(zeros=4)}
    known = catalogue.create
    monkeypatch.setattr(catalogue, "create", lambda axis, what, *rest: made.get(str(what)) or known(axis, what, *rest))
    losses, runs = {}, {}
    for name in made:
        runs[name] = pipeline.specialize(
            str(tmp_path / "data.jsonl"), recipe={**VALUES, "base": str(llama_folder), "output": str(tmp_path / "runs")},
            examples=name, name=name, quiet=True,
        )  # fmt: skip
        told = [json.loads(line) for line in runs[name].path("metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in told if "loss" in line]
    chosen = records_from_file(runs["half"].path("data", "chosen.jsonl"))
    assert {record.weight for record in chosen} == {0.5} and len(chosen) == 12
    assert losses["half"][0] == pytest.approx(losses["even"][0] / 2, rel=1e-3)
    assert losses["zeros"] == losses["out"] != losses["even"]
    told = json.loads(runs["zeros"].path("examples.json").read_text())["chosen"]
    assert told == 8 == pd.read_parquet(runs["zeros"].path("scores.parquet"))["chosen"].sum()
    zeros, out = ((runs[name].path("specialist") / "changed.safetensors").read_bytes() for name in ("zeros", "out"))
    assert zeros == out
