"""Choosing examples as a user does: from a recipe, from Python, from the command line."""

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

import selectune
from selectune import recipe as recipes
from selectune.cli import app
from selectune.data import records_from_file
from selectune.errors import UserError
from selectune.examples import by_default
from selectune.run import Run


@pytest.fixture
def pool_file(tmp_path):
    lines = [{"question": f"What is fault {i}?", "answer": "lamp " * (i % 7 + 1) + str(i)} for i in range(10, 70)]
    file = tmp_path / "pool.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_the_command_writes_the_longest(pool_file, tmp_path, llama_folder):
    out, scores = tmp_path / "out.jsonl", tmp_path / "scores.parquet"
    done = CliRunner().invoke(app, ["select", str(pool_file), "-m", "longest", "--count", "8", "-o", str(out), "--scores", str(scores),
                                    "--base", str(llama_folder)])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "8 of 60 records" in done.output
    chosen = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(chosen) == 8
    assert all(record["messages"][1]["content"].startswith("lamp " * 7) for record in chosen)
    assert pd.read_parquet(scores)["chosen"].sum() == 8


def test_mistakes_are_one_line(pool_file, llama_folder):
    for wrong, told in (
        ({"method": "longset"}, "longest"),
        ({"method": "longest", "count": 1000}, "at most 60"),
        ({"method": "longest", "target": "nowhere.jsonl"}, "nowhere"),
        ({"method": "longest:fractoin=0.1"}, "fraction"),
        ({"method": "longest", "columns": {"question": "Frage"}}, "Frage"),
        ({"method": "longest", "out": "/no/such/folder/out.jsonl"}, "does not exist"),
        ({"method": "longest", "scores": "/no/such/folder/s.parquet"}, "does not exist"),
        ({"method": "longest", "out": "/dev/full/x"}, "does not exist"),
        ({"method": "longest", "out": pool_file.parent}, "is a folder"),
        ({"method": "longest", "seed": -1}, "field 'seed'"),
        ({"method": "longest", "seed": 2**32}, "field 'seed'"),
    ):
        with pytest.raises(UserError, match=told) as error:
            selectune.choose_examples(str(pool_file), base=str(llama_folder), quiet=True, **wrong)
        assert "\n" not in str(error.value)


def test_what_cannot_be_written_is_told_before_anything_is_measured(pool_file, tmp_path, monkeypatch):
    """The file of records is never the one that is read, nor the target's."""
    target, before = tmp_path / "target.jsonl", pool_file.read_text()
    target.write_text(before)
    monkeypatch.chdir(tmp_path)
    for options in ({"out": "pool.jsonl"}, {"out": str(target)}, {"scores": pool_file}):
        with pytest.raises(UserError, match="would be overwritten"):
            selectune.choose_examples([str(pool_file)], "loss", target=str(target), base="nowhere", **options)
    assert pool_file.read_text() == target.read_text() == before
    monkeypatch.setattr("os.access", lambda place, how: False)
    with pytest.raises(UserError, match="cannot be written"):
        selectune.choose_examples(str(pool_file), "loss", base="nowhere", out="out.jsonl")


def test_a_run_trains_on_what_was_chosen(pool_file, tmp_path, llama_folder):
    values = {"base": str(llama_folder), "form": "full", "training": {"max_steps": 2, "evaluations": 0, "batch_sequences": 2},
              "evaluation": {"benchmarks": [], "forgetting": False, "samples": 0, "target_items": 4}, "output": str(tmp_path)}  # fmt: skip
    run = selectune.specialize(str(pool_file), examples="longest:count=6", name="chosen", quiet=True, **values)
    chosen = records_from_file(run.path("data", "chosen.jsonl"))
    pool = records_from_file(run.path("data", "train.jsonl"))
    assert len(chosen) == 6 < len(pool)
    assert {record.key for record in chosen} <= {record.key for record in pool}
    assert len(pd.read_parquet(run.path("scores.parquet"))) == len(pool)
    assert [cost.stage for cost in run.costs()].count("choose_examples") == 1
    again = selectune.resume(run.folder, quiet=True)
    assert records_from_file(again.path("data", "chosen.jsonl")) == chosen
    plain = selectune.specialize(str(pool_file), name="plain", quiet=True, **values)
    assert not Run.open(plain.folder).has("data/chosen.jsonl")


def test_of_a_large_pool_what_a_named_target_lacks_trains_by_default(pool_file, tmp_path, llama_folder, monkeypatch):
    values = {"base": str(llama_folder), "form": "full", "training": {"max_steps": 1, "evaluations": 0, "batch_sequences": 2},
              "evaluation": {"benchmarks": [], "forgetting": False, "samples": 0, "target": "off"}, "output": str(tmp_path)}  # fmt: skip
    target = tmp_path / "target.jsonl"
    target.write_text(json.dumps({"question": "What is fault 33?", "answer": "lamp 33"}) + "\n")

    def chosen(name, **data):
        run = selectune.specialize(str(pool_file), name=name, quiet=True, **values, data=data)
        return json.loads(run.path("examples.json").read_text()) if run.has("examples.json") else None

    assert chosen("small", target=str(target)) is None
    monkeypatch.setattr(by_default, "LARGE", 40)
    assert chosen("unnamed") is None
    found = chosen("large", target=str(target))
    assert found["method"]["method"] == "sift" and 0 < found["chosen"] < 0.3 * found["pool"]
    assert "`examples: all`" in found["notes"][-1]
    values["examples"] = "all"
    assert chosen("all", target=str(target)) is None


def test_where_signals_are_measured_changes_no_run(pool_file, tmp_path, llama_folder):
    values = {"base": str(llama_folder), "form": "full", "training": {"max_steps": 1, "evaluations": 0, "batch_sequences": 2},
              "evaluation": {"benchmarks": [], "forgetting": False, "samples": 0, "target": "off"}, "output": str(tmp_path)}  # fmt: skip
    run = selectune.specialize(str(pool_file), examples="longest:count=6", name="here", quiet=True, **values)
    stages = ("prepare", "choose_examples", "train")
    before = [run.path("stages", f"{stage}.json").stat().st_mtime_ns for stage in stages]
    for engine, system, again in (("ray", None, False), ("local", "Be brief.", True)):
        recipe = run.recipe
        recipe.data.engine, recipe.data.system = engine, system
        run.path("recipe.yaml").write_text(recipes.dump(recipe))
        selectune.resume(run.folder, quiet=True)
        after = [run.path("stages", f"{stage}.json").stat().st_mtime_ns for stage in stages]
        assert [new != old for new, old in zip(after, before, strict=True)] == [again] * 3


def test_a_full_disk_is_one_line_and_what_was_measured_is_kept(pool_file, tmp_path, llama_folder, monkeypatch):
    import pyarrow.parquet as parquet

    from selectune.examples.factors import store

    monkeypatch.setattr(store, "BATCH", 20)
    monkeypatch.setattr(store, "SECONDS", 0)
    plain, writes = parquet.write_table, []

    def full(table, place):
        writes.append(place)
        if len(writes) == 2:
            raise OSError(28, "No space left on device")
        plain(table, place)

    monkeypatch.setattr(parquet, "write_table", full)
    kept = tmp_path / "kept"
    asked = {"method": "loss:count=5", "base": str(llama_folder), "folder": kept, "quiet": True}
    with pytest.raises(UserError, match="No space left"):
        selectune.choose_examples(str(pool_file), **asked)
    assert len(list(kept.rglob("part-*.parquet"))) == 1
    assert selectune.choose_examples(str(pool_file), **asked).chosen == 5
    assert len(writes) == 4 and len(list(kept.rglob("part-*.parquet"))) == 3
