"""The catalogue as a person sees it: lines that work as they stand, documented hyper-parameters, pages that are not stale."""

import ast
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import yaml
from pydantic import Field
from rich.console import Console

from selectune import catalogue, cli, recipe
from selectune.errors import UserError
from selectune.reporting import methods as shown

DOCS = Path(__file__).parents[1] / "docs" / "methods"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
EVERY = [(axis, name) for axis in catalogue.AXES for name in catalogue.methods(axis)]


def text(show, *arguments):
    console = Console(width=160, record=True, file=io.StringIO())
    show(*arguments, console)
    return console.export_text()


@pytest.mark.parametrize("axis,name", EVERY)
def test_the_lines_that_are_shown_make_the_method_with_its_defaults(axis, name):
    method = catalogue.methods(axis)[name]
    assert not [key for key, info in method.model_fields.items() if info.is_required()], "every hyper-parameter has a default"
    values = yaml.safe_load(shown.recipe_line(method))
    (key,) = values
    assert catalogue.create(axis, getattr(recipe.parse(values), key)) == method()
    call = ast.parse(shown.python_line(method)).body[0].value
    assert catalogue.create(axis, ast.literal_eval(call.keywords[0].value)) == method() and call.keywords[0].arg == key


@pytest.mark.parametrize("axis,name", EVERY)
def test_every_hyper_parameter_is_documented(axis, name):
    assert not [row.name for row in shown.hypers(catalogue.methods(axis)[name]) if not row.said]


def test_types_and_defaults_are_in_words():
    class Example(catalogue.Method):
        axis: ClassVar[str] = "an axis of its own"
        name: ClassVar[str] = "example"
        summary: ClassVar[str] = "An example."

        a: Annotated[int, Field(gt=0)] | None = None
        """First: ``1`` or
        more."""
        b: Annotated[float, Field(ge=0, lt=1)] = 0.5
        """Second."""
        c: Literal["x", "y"] = "x"
        """Third."""
        d: tuple[int, ...] = (1, 2)
        """Fourth."""
        e: str
        """Fifth."""

    rows = {row.name: row for row in shown.hypers(Example)}
    assert rows["a"] == shown.Hyper("a", "int > 0 or none", "null", "First: `1` or more.")
    assert rows["b"].type == "float ≥ 0, < 1" and rows["b"].default == "0.5"
    assert rows["c"].type == '"x" or "y"' and rows["c"].default == '"x"'
    assert rows["d"].type == "tuple of int, any number" and rows["d"].default == "(1, 2)"
    assert rows["e"].default == "none: must be given"
    assert yaml.safe_load(shown.recipe_line(Example))["an axis of its own"]["e"] == "..."


def test_a_paper_in_short_is_where_and_when_it_appeared():
    papers = {
        "On Surgical, and Other, Fine-tuning, EMNLP Findings 2023, arXiv 2310.17041": "EMNLP Findings 2023, arXiv 2310.17041",
        "A Title, 2025, arXiv 2508.05629": "2025, arXiv 2508.05629",
        "A title without a year": "A title without a year",
    }
    for paper, expected in papers.items():
        assert shown.paper_short(type("One", (), {"paper": paper})) == expected


def test_tables_name_every_method_and_one_method_shows_all(capsys):
    listed = text(shown.show_methods, None)
    for axis, name in EVERY:
        assert name in listed and axis in listed
    assert "fisher_blocks" not in text(shown.show_methods, "adapters")
    one = text(shown.show_method, "fisher_blocks")
    for part in (
        "2310.17041",
        "Departs",
        "examples",
        "64",
        '"true" or "sampled"',
        "How many blocks train.",
        "selectune.specialize(",
    ):
        assert part in one


@pytest.mark.parametrize("arguments", [["methods"], ["methods", "list"], ["methods", "parameters"], ["methods", "show", "lora"]])
def test_commands(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["selectune", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code and ("lora" if "show" in arguments else "fisher_blocks") in capsys.readouterr().out


def test_mistakes_are_told():
    with pytest.raises(UserError, match="did you mean 'parameters'"):
        shown.show_methods("parameter")
    with pytest.raises(UserError, match="did you mean 'fisher_blocks'"):
        shown.show_method("fisher_block")


def test_the_pages_are_not_stale():
    made = shown.pages(RESULTS)
    written = {file.name: file.read_text(encoding="utf-8") for file in DOCS.glob("*.md")}
    stale = sorted(name for name in made.keys() | written.keys() if made.get(name) != written.get(name))
    assert not stale, f"write them again with `make docs`: {', '.join(stale)}"


def test_every_link_of_the_index_leads_to_a_heading():
    made = shown.pages()
    links = re.findall(r"\]\(([\w-]+\.md)(?:#([\w-]+))?\)", made["index.md"])
    assert len(links) > len(EVERY)
    for page, heading in links:
        assert not heading or f"\n## {heading}\n" in made[page]
    assert all("](index.md)" in page for name, page in made.items() if name != "index.md")


def test_every_axis_says_what_it_asks():
    assert shown.question("parameters") == "Which weights may change?"
    assert all(shown.question(axis) for axis in catalogue.AXES if catalogue.methods(axis))


def test_every_family_is_explained():
    assert not [name for name in shown.pages() if name.removesuffix(".md") not in {*shown.FAMILIES, "index"}]


def test_writing_removes_what_is_gone_and_nothing_by_other_hands(tmp_path):
    (tmp_path / "gone.md").write_text(shown.WRITTEN + "\n# Gone\n")
    (tmp_path / "notes.md").write_text("# By hand\n")
    made = shown.write_pages(tmp_path)
    assert {file.name for file in tmp_path.glob("*.md")} == {file.name for file in made} | {"notes.md"}


def test_evidence_is_read_as_far_as_it_is_understood(tmp_path):
    file = tmp_path / "parameters.json"
    file.write_text(json.dumps({
        "claims": [
            {"method": "fisher_blocks", "claim": "Better than chance.", "verdict": "reproduced", "intervals": {"gain": [0.01, 0.02, 0.03]}},
            {"method": "our norms", "claim": "As good as everything", "verdict": "not run", "intervals": {}},
        ],
        "cells": [
            {"method": "our norms", "task": "law", "recipe": {"parameters": {"method": "norms"}}},
            {"method": "last_blocks", "task": "law", "recipe": {"parameters": "last_blocks:k=2"}},
            {"method": "last_blocks", "task": "birds", "recipe": {}},
            {"method": "first_blocks", "task": "law", "failed": "no memory"},
        ],
    }))  # fmt: skip
    assert shown.evidence_of(file) == {
        (False, "fisher_blocks"): [("parameters", "Better than chance: reproduced (gain +0.020 [+0.010, +0.030]).")],
        (False, "norms"): [("parameters", "As good as everything: not run.")],
        (False, "last_blocks"): [("parameters", "measured on birds, law; no claim is decided.")],
    }
    assert "results/parameters.md).** Better than chance: reproduced" in shown.pages(file)["blocks.md"]
    (tmp_path / "which.json").write_text(json.dumps({
        "protocol": {"axis": "examples"}, "claims": [{"method": "random", "claim": "Hard to beat", "verdict": "reproduced"}],
        "cells": [{"method": "halves", "task": "law", "recipe": {"examples": "longest:fraction=0.5", "parameters": "last_blocks"}}],
    }))  # fmt: skip
    (tmp_path / "speed.json").write_text("[1, 2]")
    both = shown.evidence_of(tmp_path)
    assert both == shown.evidence_of(file) | {
        (True, "random"): [("which", "Hard to beat: reproduced.")],
        (True, "longest"): [("which", "measured on law; no claim is decided.")],
    }
    of_weights, of_records = (shown.pages(tmp_path)[name] for name in ("parameters.md", "controls.md"))
    assert "Hard to beat" not in of_weights and "results/which.md).** Hard to beat: reproduced." in of_records
    file.write_text("{}")
    assert shown.evidence_of(file) == {}
    assert shown.evidence_of(tmp_path / "none.json") == {} == shown.evidence_of(None)


def test_a_list_of_methods_waits_for_no_trainer():
    """What trains, measures and adapts takes seconds to load."""
    heavy = ["accelerate", "datasets", "pandas", "peft", "scipy.stats", "transformers.modeling_utils", "transformers.trainer"]
    code = f"import sys; from selectune import catalogue; catalogue.methods('parameters'); print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
