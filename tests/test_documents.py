"""What the documents show works as it is written: every recipe and experiment names methods and settings that exist."""

import re
from pathlib import Path

import pytest
import yaml

from selectune import catalogue, recipe
from selectune.experiment import protocol

ROOT = Path(__file__).parents[1]
SHOWN = [
    pytest.param(block, id=f"{path.relative_to(ROOT)}-{number}")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.S))
]


@pytest.mark.parametrize("block", SHOWN)
def test_what_is_shown_is_a_recipe_or_an_experiment(block, tmp_path):
    values = yaml.safe_load(block)
    if "tasks" in values:
        (tmp_path / "shown.yaml").write_text(
            yaml.safe_dump({"name": "shown", "base": "smollm2-135m-instruct"} | values), encoding="utf-8"
        )
        assert protocol.load(tmp_path / "shown.yaml").methods
        return
    found = recipe.parse(values)
    for axis, key in catalogue.KEYS.items():
        if getattr(found, key) is not None:
            catalogue.create(axis, getattr(found, key), key)


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_names_what_there_is(file):
    assert protocol.load(file).tasks


@pytest.mark.parametrize(
    ("values", "form"),
    [({}, "lora"), ({"parameters": "gps:k=2"}, "full"), ({"parameters": {"method": "lofit"}}, "lofit"), ({"parameters": "last_blocks:k=2"}, "lora"),
     ({"parameters": "spafit"}, "sparse_and_low_rank:rank=16,alpha=32"), ({"parameters": "gps", "form": "lora"}, "lora")],
)  # fmt: skip
def test_weights_that_are_chosen_change_in_the_form_they_are_chosen_for(values, form):
    assert recipe.parse(values).form == form


@pytest.mark.parametrize(
    ("parameters", "form", "rate"), [("all", "full", 1e-4), ("all", "lora", 1e-3), ("gps", "full", 1e-3), ("lift", "full", 5e-4),
                                     ("s2ft", "full", 1e-3), ("last_blocks", "full", 1e-4)]
)  # fmt: skip
def test_few_entries_train_at_a_larger_rate(parameters, form, rate):
    assert catalogue.create("parameters", parameters).peak_rate(catalogue.create("adapters", form)) == rate
