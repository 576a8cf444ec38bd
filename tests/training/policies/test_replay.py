"""Exactly a share of general records is mixed in."""

from types import SimpleNamespace

import pytest
import torch

from selectune import recipe as recipes
from selectune.data.packing import record_spans
from selectune.errors import UserError
from selectune.meter import Meter
from selectune.pipeline import Chain, choose, prepare, train
from selectune.pipeline.training import trainable
from selectune.run import Run
from tests.training.policies.running import run, same
from tests.training.policies.staged import make


def context(train, general, seed=0):
    return SimpleNamespace(train=list(range(train)), general=[f"g{i}" for i in range(general)],
                           generator=torch.Generator().manual_seed(seed))  # fmt: skip


@pytest.mark.parametrize(("share", "train", "count"), [(0.1, 48, 5), (0.1, 44, 4), (0.0, 50, 0), (0.5, 7, 4), (1.0, 20, 20)])
def test_exactly_the_share_without_repetition(share, train, count):
    policy = make({"method": "replay", "share": share})
    found = policy.records(context(train, 30), list)
    assert len(found) == len(set(found)) == count and set(found) <= {f"g{i}" for i in range(30)}
    assert found == policy.records(context(train, 30), list)
    assert count in (0, 20) or found != policy.records(context(train, 30, seed=1), list)


def test_more_than_there_are_is_refused():
    with pytest.raises(UserError, match="16 general records are asked for and there are 15"):
        make("replay:share=0.5").records(context(32, 15), list)


def test_general_records_may_come_from_a_file(tmp_path):
    file = tmp_path / "general.jsonl"
    file.write_text("".join(f'{{"question": "What is {i}?", "answer": "Number {i}."}}\n' for i in range(9)), encoding="utf-8")
    found = make({"method": "replay", "share": 0.5, "source": str(file)}).records(context(8, 0), list)
    assert len(found) == 4 and all(record.response.startswith("Number") for record in found)


@pytest.mark.parametrize(("contamination", "count"), [("remove", 5), ("off", 9)])
def test_records_that_overlap_with_the_test_set_do_not_train(contamination, count, tmp_path):
    def write(name, rows, asked):
        text = "".join(f'{{"question": "{asked} {i}?", "answer": "Number {i}."}}\n' for i in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    source, data = write("general.jsonl", range(9), "What is"), write("train.jsonl", range(20), "Who has")
    values = {
        "data": {"train": data, "test": write("test.jsonl", range(4), "What is"), "contamination": contamination},
        "policy": {"method": "replay", "source": source, "share": 1.0}, "evaluation": {"benchmarks": []},
    }  # fmt: skip
    chain = Chain(Run.create(tmp_path / "run", recipes.parse(values)), recipes.parse(values), quiet=True)
    prepare(chain)
    found = chain.policy.records(context(count, 0), chain.clean)
    assert sorted(record.question for record in found) == [f"What is {i}?" for i in range(9 - count, 9)]


def test_other_records_in_the_source_make_a_training_stale(tmp_path, llama_folder):
    source = tmp_path / "general.jsonl"
    told = []
    for answer in ("red", "red", "blue"):
        source.write_text(f'{{"question": "Which?", "answer": "{answer}"}}\n', encoding="utf-8")
        values = {"data": {"train": str(source)}, "policy": {"method": "replay", "source": str(source)}}
        chain = Chain(Run.create(tmp_path / f"run-{len(told)}", recipes.parse(values)), recipes.parse(values), quiet=True)
        chain.stage = lambda name, inputs, work: told.append(inputs)
        train(chain)
    assert told[0] == told[1] != told[2]


@pytest.mark.parametrize("content", [None, "", '{"a": 1}\n'])
def test_records_that_cannot_be_used_are_told_before_any_work(content, tmp_path):
    source, data = tmp_path / "general.jsonl", tmp_path / "train.jsonl"
    data.write_text("".join(f'{{"question": "Who has {i}?", "answer": "Number {i}."}}\n' for i in range(10)), encoding="utf-8")
    if content is not None:
        source.write_text(content, encoding="utf-8")
    values = {
        "data": {"train": str(data)},
        "policy": {"method": "replay", "source": str(source)},
        "evaluation": {"benchmarks": []},
    }
    chain = Chain(Run.create(tmp_path / "run", recipes.parse(values)), recipes.parse(values), quiet=True)
    with pytest.raises(UserError, match=r"general\.jsonl") as told:
        prepare(chain)
    assert "\n" not in str(told.value) and not chain.run.has("data.json")


@pytest.mark.parametrize(("share", "count"), [(0.0, 10), (0.25, 12), (1.0, 20)])
def test_every_epoch_holds_the_records_and_exactly_the_share(share, count, tmp_path, llama_folder):
    data = tmp_path / "train.jsonl"
    data.write_text("".join(f'{{"question": "Who has {i}?", "answer": "Number {i}."}}\n' for i in range(10)), encoding="utf-8")
    values = {"base": str(llama_folder), "form": "full", "policy": {"method": "replay", "share": share}, "evaluation": {"benchmarks": []},
              "data": {"train": str(data), "dev_fraction": 0.0, "test_fraction": 0.0}}  # fmt: skip
    chain = Chain(Run.create(tmp_path / "run", recipes.parse(values)), recipes.parse(values), quiet=True)
    prepare(chain)
    choose(chain)
    rows = trainable(chain, Meter("train"))[0].train_rows
    assert sum(len(record_spans(row["position_ids"][None], row["labels"][None])) for row in rows) == count


def test_the_training_itself_is_plain(tmp_path, llama_folder):
    assert same(run(tmp_path / "a", llama_folder).after, run(tmp_path / "b", llama_folder, "replay").after)
