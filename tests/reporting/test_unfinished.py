"""A page of a run that is not finished says what is missing and how to go on; runs that differ are compared with a note."""

import shutil

import pytest

from selectune import pipeline
from selectune.errors import UserError
from selectune.reporting import write_comparison, write_report
from selectune.run import Evaluation, Run, Scores
from tests.test_mistakes import lines, put

ROWS = [{"question": f"What is lamp {i}?", "answer": f"It is number {i * 3 % 17}."} for i in range(40)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, llama_folder):
    folder = tmp_path_factory.mktemp("pages")
    put(folder, "data.jsonl", lines(ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELECTUNE_CACHE", str(folder / "cache"))
        values = {
            "base": str(llama_folder), "output": str(folder / "runs"), "form": "lora", "data": {"max_length": 64},
            "parameters": "federated_layers:k=1,clients=2,examples=2",
            "training": {"max_steps": 2}, "evaluation": {"target_items": 4, "samples": 1, "max_new_tokens": 2},
        }  # fmt: skip
        yield pipeline.specialize(str(folder / "data.jsonl"), recipe=values, quiet=True, name="whole")


def copy(run, name, without=()):
    other = run.folder.with_name(name)
    shutil.copytree(run.folder, other)
    for stage in without:
        (other / "stages" / f"{stage}.json").unlink()
    return Run.open(other)


def test_an_unfinished_run_says_what_is_missing(run):
    half = copy(run, "half", ["train", "measure_specialist", "judge", "report"])
    for file in ("verdict.json", "evaluation.json", "training.json", "samples.json"):
        half.path(file).unlink()
    page = write_report(half).read_text(encoding="utf-8")
    assert "This run is not finished" in page and f"selectune resume {half.folder}" in page
    assert "has not finished" in page and "Only the base has been judged" in page
    with pytest.raises(UserError, match=r"is not finished.*selectune resume"):
        write_comparison([run, half], run.folder.with_name("c.html"))


def test_what_a_choice_of_weights_notes_is_on_the_page(run):
    (note,) = run.read("scores.json", Scores).notes
    assert note.endswith("the union of 1 for each of 2 clients.") and note in write_report(run).read_text(encoding="utf-8")


def test_runs_on_other_items_are_noted(run):
    other = copy(run, "other")
    evaluation = other.read("evaluation.json", Evaluation)
    target = next(b for b in evaluation.benchmarks if b.role == "target")
    target.name = "target"
    target.items = target.items[:-1]
    other.write("evaluation.json", evaluation)
    page = write_comparison([run, other], run.folder.with_name("c.html")).read_text(encoding="utf-8")
    assert "different target items" in page and "Where the recipes differ" in page
    page = write_comparison([run, copy(run, "third")], run.folder.with_name("c.html")).read_text(encoding="utf-8")
    assert "different target items" not in page
