"""An experiment goes on from the JSON beside its page, where the folder with its pieces is gone."""

import json
import shutil

import pytest

import selectune
from selectune.errors import UserError
from selectune.experiment.budget import Facts
from selectune.experiment.plan import Plan
from selectune.experiment.protocol import load
from selectune.experiment.record import facts_of
from selectune.experiment.runner import Runner
from tests.experiment.test_running import cells, pieces, write

FEW = {
    "methods": [
        {"name": "gradient", "parameters": "scored:score=gradient,examples=2"},
        "lora",
        {"name": "too many blocks", "parameters": "last_blocks:k=9"},
    ],
    "controls": {"lora": False, "full_fine_tuning": False, "last_blocks": False},
    "seeds": [0, 1],
}


def page_of(folder):
    return folder / "runs" / "small" / "page.json"


@pytest.fixture(scope="module")
def begun(tmp_path_factory, llama_folder):
    folder = tmp_path_factory.mktemp("begun")
    selectune.experiment(write(folder, llama_folder, **FEW), quiet=True)
    return folder


@pytest.fixture
def moved(begun, tmp_path):
    """The page's JSON alone, on another machine."""
    page_of(tmp_path).parent.mkdir(parents=True)
    shutil.copy(page_of(begun), page_of(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_nothing_is_done_again(moved, begun, llama_folder, capfd):
    file = write(moved, llama_folder, **FEW, data_root=str(begun))
    page = selectune.experiment(file, page_only=True)
    assert "8 cells are there already" in capfd.readouterr().err
    assert (
        cells(moved) == cells(begun)
        and [name for (name, _), cell in cells(moved).items() if cell["failed"]] == ["too many blocks"] * 2
    )
    assert page.read_text() == (page_of(begun).with_suffix(".md")).read_text()
    selectune.experiment(file, quiet=True)
    assert cells(moved) == cells(begun)
    assert not list((moved / "runs" / "small" / "trials").glob("*/"))
    assert sorted(pieces(moved)) == sorted(pieces(begun))


@pytest.mark.slow
def test_what_is_new_is_done_and_its_choice_made_again(moved, begun, llama_folder):
    """A further learning rate needs the choice's file; what was measured stays on the page until a better one is."""
    wider = write(moved, llama_folder, **FEW, data_root=str(begun), widen=1)
    selectune.experiment(wider, quiet=True, page_only=True)
    assert {key: cell["benchmarks"] for key, cell in cells(moved).items()} == {
        key: cell["benchmarks"] for key, cell in cells(begun).items()
    }
    before = pieces(moved)
    selectune.experiment(wider, quiet=True)
    after, found = pieces(moved), cells(moved)
    assert all(after[path] == before[path] for path in before)
    for (name, seed), cell in found.items():
        assert cell["failed"] if name == "too many blocks" else len(cell["grid"]) == (1 if seed else 3), name
        assert cells(begun)[name, seed]["grid"].items() <= cell["grid"].items() or seed
    assert sum(path.parts[2] == "choices" for path in after) == sum(path.parts[2] == "choices" for path in before)


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {"training": {"max_steps": 5, "batch_sequences": 2, "max_length": 64, "precision": "float32"}}, {"budgets": [1500]},
    {"tasks": {"lamps": {"train": "data.jsonl", "test_fraction": 0.2, "train_records": 29, "test_records": 8}}},
])  # fmt: skip
def test_cells_of_another_experiment_are_not_taken_up(change, moved, begun, llama_folder):
    selectune.experiment(write(moved, llama_folder, **FEW | change, data_root=str(begun)), quiet=True, page_only=True)
    assert all(cell["failed"] for cell in cells(moved).values()) and not [
        path for path in pieces(moved) if path.parts[2] != "choices"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["", "[]", '{"facts": 3}', '"words"'])
def test_a_file_that_is_no_record_is_told(broken, moved, begun, llama_folder):
    page_of(moved).write_text(broken)
    with pytest.raises(UserError, match=r"cells of an experiment.*page\.json|page\.json.*cells of an experiment"):
        selectune.experiment(write(moved, llama_folder, **FEW, data_root=str(begun)), quiet=True, page_only=True)
    assert page_of(moved).read_text() == broken


@pytest.mark.slow
def test_a_record_with_a_cell_that_is_broken_is_told(moved, begun, llama_folder):
    record = json.loads(page_of(moved).read_text())
    del record["cells"][0]["benchmarks"]
    page_of(moved).write_text(json.dumps(record))
    with pytest.raises(UserError, match="cells of an experiment"):
        selectune.experiment(write(moved, llama_folder, **FEW, data_root=str(begun)), quiet=True, page_only=True)


@pytest.mark.parametrize(("said", "begun", "here", "refused"), [
    ("auto", True, False, True), ("auto", False, True, True), ("auto", False, False, False), ("bfloat16", True, True, False),
    ("float32", True, False, False),
])  # fmt: skip
@pytest.mark.parametrize("where", ["record", "folder"])
def test_another_machine_does_not_begin_anew_in_another_precision(where, said, begun, here, refused, tmp_path, llama_folder):
    protocol = load(write(tmp_path, llama_folder, **FEW, training={"precision": said}))
    runner = Runner(protocol, record=tmp_path / "page.json")
    facts = Facts(fingerprint="x", total_parameters=10, blocks=[1], bfloat16=begun)
    if where == "folder":
        runner.store.facts.parent.mkdir(parents=True)
        runner.store.facts.write_text(facts.model_dump_json())
    else:
        runner.record.write_text(json.dumps({"facts": facts.model_dump()}))
    if refused:
        with pytest.raises(UserError, match="precision"):
            runner._same_precision(facts.model_copy(update={"bfloat16": here}))
    else:
        runner._same_precision(facts.model_copy(update={"bfloat16": here}))


@pytest.mark.slow
def test_what_failed_elsewhere_is_tried_again_when_asked(moved, begun, llama_folder):
    protocol = load(write(moved, llama_folder, **FEW, data_root=str(begun)))
    for retry in (False, True):
        runner = Runner(protocol, quiet=True, record=page_of(moved), retry_failed=retry)
        plan = Plan(protocol, facts_of(page_of(moved)), runner.store)
        runner.take_up(plan)
        failed = [slot for slot in plan.slots() if slot.line.name == "too many blocks"]
        assert len(failed) == 2 and all((plan.next(slot) is not None) == retry for slot in failed)


@pytest.mark.slow
def test_steps_that_followed_from_seconds_stay_when_the_clock_is_another(tmp_path, llama_folder):
    few = {"methods": [], "controls": {"lora": False, "full_fine_tuning": False, "last_blocks": False}, "seeds": [0],
           "tables": {"resources": {"seconds": 4}}}  # fmt: skip
    file = write(tmp_path, llama_folder, **few)
    selectune.experiment(file, quiet=True)
    record = json.loads(page_of(tmp_path).read_text())
    rows = {cell["table"]: cell for cell in record["cells"] if cell["method"] == "random"}
    steps = rows["resources"]["steps"]
    assert not rows["resources"]["failed"] and steps > 0
    rows["entries"]["step_seconds"] *= 1.5
    page_of(tmp_path).write_text(json.dumps(record))
    for limits, there in (({"seconds": 4}, True), ({"seconds": 5}, False)):
        shutil.rmtree(tmp_path / "runs" / "small" / "cells")
        for where in ("trials", "choices", "within"):
            shutil.rmtree(tmp_path / "runs" / "small" / where, ignore_errors=True)
        page_of(tmp_path).write_text(json.dumps(record))
        selectune.experiment(write(tmp_path, llama_folder, **few | {"tables": {"resources": limits}}), quiet=True, page_only=True)
        found = {cell["table"]: cell for cell in json.loads(page_of(tmp_path).read_text())["cells"] if cell["method"] == "random"}
        assert (not found["resources"]["failed"] and found["resources"]["steps"] == steps) == there
