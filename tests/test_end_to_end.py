"""The whole chain on a tiny base: three doors to one run, what it leaves, what it says."""

import json
import re

import pytest
import torch
import typer

from selectune import catalogue, cli, pipeline
from selectune import recipe as recipes
from selectune.reporting import write_comparison, write_report
from selectune.run import STAGES, DataSummary, Run, Scores
from tests.test_mistakes import lines, put

ROWS = [{"question": f"Which lamp belongs to fault {i}?", "answer": f"Lamp {i * 7 % 50} <b>left</b>."} for i in range(60)]
VALUES = {
    "form": "full", "parameters": "fisher_blocks:k=2,examples=4", "data": {"max_length": 128},
    "training": {"epochs": 2, "batch_sequences": 4, "evaluations": 2},
    "evaluation": {"target_items": 6, "samples": 3, "max_new_tokens": 6, "benchmarks": ["probe"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, llama_folder):
    folder = tmp_path_factory.mktemp("chain")
    put(folder, "data.jsonl", lines(ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELECTUNE_CACHE", str(folder / "cache"))
        yield folder, {**VALUES, "base": str(llama_folder), "output": str(folder / "runs")}


@pytest.fixture(scope="module")
def run(place):
    folder, values = place
    return pipeline.specialize(str(folder / "data.jsonl"), recipe=values, quiet=True, name="first")


def test_a_run_leaves_what_it_promises(run):
    assert all(run.finished(stage) for stage in STAGES)
    verdict, scores = pipeline.verdict_of(run), run.read("scores.json", Scores)
    assert {d.benchmark for d in verdict.differences} >= {"target", "probe", "forgetting/cross_entropy", "forgetting/kl"}
    assert sum(block.trained for block in scores.blocks) == 2 and all(block.score > 0 for block in scores.blocks)
    assert run.read("data.json", DataSummary).tokens["sequences"] > 0
    assert [cost.stage for cost in run.costs()] == list(STAGES)
    train = next(cost for cost in run.costs() if cost.stage == "train")
    assert train.backward_tokens > 0 and train.flops > 0 and train.bytes_written > 0
    before, after = (next(c for c in run.costs() if c.stage == stage) for stage in ("measure_base", "measure_specialist"))
    assert before.forward_tokens > 0 and before.backward_tokens == 0 and before.flops > 0
    assert after.forward_tokens > before.forward_tokens  # forgetting is read there, by both models


def test_the_report_is_one_page_without_network_and_escaped(run):
    page = write_report(run).read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=|@import|url\(""", page)
    assert "<b>left" not in page and "&lt;b&gt;left" in page
    for heading in (
        "Before and after",
        "Training",
        "What was trained",
        "Answers before and after",
        "Data",
        "What it cost",
        "Recipe",
    ):
        assert heading in page
    assert page.count("<svg") >= 4 and "prefers-color-scheme: dark" in page and "@media print" in page


def test_a_finished_run_is_not_done_again(run, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file() and path.suffix != ".html"}
    pipeline.resume(run.folder, quiet=True)
    assert before == {
        path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file() and path.suffix != ".html"
    }


def test_the_three_doors_give_the_same_weights(run, place, monkeypatch, capsys):
    folder, values = place
    from safetensors.torch import load_file

    file = folder / "recipe.yaml"
    parsed = recipes.parse(pipeline.merge(values, {"name": "second", "data": {"train": str(folder / "data.jsonl")}}))
    file.write_text(recipes.dump(parsed))
    monkeypatch.setattr("sys.argv", ["selectune", "specialize", "--recipe", str(file), "--quiet"])
    cli.main_without_exit()
    assert "before and after" in capsys.readouterr().out
    second = Run.open(folder / "runs" / "second")
    first, again = (load_file(r.path("specialist", "changed.safetensors")) for r in (run, second))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    page = write_comparison([run, second], folder / "comparison.html").read_text(encoding="utf-8")
    assert "first" in page and "second" in page and "Pareto" not in page


def test_required_retention_sets_the_exit_status(run, monkeypatch):
    values = json.loads(run.path("verdict.json").read_text())
    recipe = run.recipe
    recipe.evaluation.require_retention = True
    monkeypatch.setattr(Run, "recipe", recipe)
    for retained, status in (("lost", 3), ("nothing lost", None)):
        run.write("verdict.json", {**values, "retained": retained})
        if status:
            with pytest.raises(typer.Exit) as caught:
                cli.specialize._finish(run, lambda run: None)
            assert caught.value.exit_code == status
        else:
            cli.specialize._finish(run, lambda run: None)
    run.write("verdict.json", values)


def test_ctrl_c_ends_with_a_checkpoint_and_resume_finishes(place, monkeypatch):
    from safetensors.torch import load_file

    from selectune.training import Interrupted
    from selectune.training.progress import EndAtStep

    folder, values = place
    step_end = EndAtStep.on_step_end

    def press(self, args, state, control, **kwargs):
        self.asked = self.asked or state.global_step == 3
        step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(EndAtStep, "on_step_end", press)
    with pytest.raises(Interrupted, match="step 3"):
        pipeline.specialize(str(folder / "data.jsonl"), recipe=values, quiet=True, name="stopped")
    monkeypatch.undo()
    monkeypatch.setenv("SELECTUNE_CACHE", str(folder / "cache"))
    stopped = pipeline.resume(folder / "runs" / "stopped", quiet=True)
    whole = load_file(folder / "runs" / "first" / "specialist" / "changed.safetensors")
    resumed = load_file(stopped.path("specialist", "changed.safetensors"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_recipes_are_commented_and_have_a_schema(tmp_path, monkeypatch, capsys):
    text = recipes.commented()
    assert recipes.parse(__import__("yaml").safe_load(text)) == recipes.Recipe()
    assert text.count("#") > 40
    assert json.loads(recipes.schema())["properties"]["data"]
    for model in (recipes.Recipe, recipes.DataRecipe, recipes.TrainingRecipe, recipes.EvaluationRecipe, recipes.BudgetRecipe):
        assert all(
            info.description or name in ("data", "training", "budget", "evaluation") for name, info in model.model_fields.items()
        )


def test_every_method_says_what_it_is():
    for axis in catalogue.AXES:
        for name, method in catalogue.methods(axis).items():
            assert method.summary and method.__doc__ and method.name == name
            assert catalogue.create(axis, name).describe()["method"] == name
