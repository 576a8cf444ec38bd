"""``selectune selection`` and ``selectune delta``: what they show is what is there, what they write is exact, mistakes are one line."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from selectune import cli, pipeline
from selectune.merging.delta import Delta
from selectune.models import load_base
from selectune.parameters.selection import Part, Selection
from selectune.reporting.selection import Layout, place_of, short
from tests.merging.test_delta import bits, disturbed, linears, same
from tests.test_end_to_end import ROWS
from tests.test_mistakes import lines, put

FAST = {"data": {"max_length": 128}, "training": {"max_steps": 3, "evaluations": 1},
        "evaluation": {"benchmarks": [], "forgetting": False, "target": "off", "samples": 0}}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, llama_folder):
    """Three small runs: two in place, one LoRA."""
    folder = tmp_path_factory.mktemp("runs")
    data = put(folder, "data.jsonl", lines(ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELECTUNE_CACHE", str(folder / "cache"))
        for name, form, parameters in (
            ("one", "full", "last_blocks:k=2"),
            ("two", "full", "first_blocks:k=3"),
            ("lora", "lora", "all"),
        ):
            pipeline.specialize(data, recipe={**FAST, "base": str(llama_folder), "output": str(folder)}, name=name, form=form,
                                parameters=parameters, quiet=True)  # fmt: skip
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command; return its status, what it printed, and its mistakes."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["selectune", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        return caught.value.code or 0, said.out, said.err

    return run


def test_show_counts_exactly_and_draws(runs, call):
    status, said, _ = call("selection", "show", runs / "one")
    selection = Selection.load(runs / "one" / "selection.safetensors")
    total = load_base(pipeline.Run.open(runs / "one").recipe.base).anatomy.total_parameters
    assert status == 0
    assert f"{selection.count():,} entries of {total:,} ({selection.count() / total:.3%})" in said and "2 of 4 blocks" in said
    for name, size in (("mlp.down_proj", 64 * 128), ("self_attn.k_proj", 64 * 32), ("input_layernorm", 64)):
        assert re.search(rf"{name}\s+{2 * size:,}\s+{2 * size:,}\s+100.000%\s+whole", said)
    assert re.search(r"0-1(\s+·)+", said) and re.search(r"2-3(\s+100)+", said)
    page = (runs / "one" / "selection.html").read_text()
    assert page.count('class="strong" opacity="1.000"') == 2 * 9 and page.count('class="weak" opacity') == 2 * 9
    assert "<script src" not in page and f"{selection.count():,}" in page


def test_show_takes_files_specialists_and_deltas(runs, call, tmp_path):
    file = tmp_path / "some.safetensors"
    Selection(
        {"model.layers.1.mlp.down_proj.weight": Part((64, 128), "elements", range(819)), "model.norm.weight": Part((64,))}
    ).save(file)
    status, said, _ = call("selection", "show", file, "-o", tmp_path / "picture.svg")
    assert status == 0 and "883 entries in 2 parameters of 1 of 2 blocks" in said
    assert re.search(r"model\.norm\s+64\s+64\s+100", said) and re.search(
        r"mlp\.down_proj\s+819\s+8,192\s+9\.998%\s+elements", said
    )
    picture = (tmp_path / "picture.svg").read_text()
    assert picture.startswith("<svg xmlns=") and "9.9976%" in picture
    assert call("selection", "show", runs / "two" / "specialist", "-o", tmp_path / "p.html")[0] == 0


def test_overlap_counts_exactly(runs, call):
    one, two = (Selection.load(runs / name / "selection.safetensors") for name in ("one", "two"))
    status, said, _ = call("selection", "overlap", runs / "one", runs / "two")
    both, union = (one & two).count(), (one | two).count()
    assert status == 0 and 0 < both < one.count()
    row = next(line.split() for line in said.splitlines() if line.split()[:1] == ["all"])
    assert row[1:4] == [f"{one.count():,}", f"{two.count():,}", f"{both:,}"] and row[-1] == f"{both / union:.3f}"


def test_layout_of_other_architectures():
    assert place_of("transformer.h.11.attn.c_attn.weight") == (11, "attn.c_attn")
    assert place_of("model.layers.2.block_sparse_moe.experts.3.w1.weight") == (2, "block_sparse_moe.experts.*.w1")
    assert place_of("transformer.wte.weight") == (None, "transformer.wte")
    assert short(["attn.c_proj", "mlp.c_proj", "mlp.c_fc", "mlp.c_fc.bias"]) == ["attn.c_proj", "mlp.c_proj", "c_fc", "c_fc.bias"]
    parts = {f"m.layers.0.experts.{i}.w1.weight": Part((2, 4), "rows", [0]) for i in range(3)}
    assert Layout.of(Selection(parts)).rows()[0][1].share == 0.5 and Layout.of(Selection(parts), 5).shares()[4] == [0.0]


def test_apply_and_revert_are_exact(runs, call, tmp_path, llama_folder):
    base = load_base(llama_folder)
    delta = Delta.load(runs / "one" / "specialist", base)
    delta.apply(base)
    status, said, _ = call("delta", "apply", runs / "one", "-o", tmp_path / "model")
    assert status == 0 and f"{delta.count():,}" in said
    assert same(bits(load_base(tmp_path / "model").model), bits(base.model))
    status, said, _ = call("delta", "revert", tmp_path / "model", runs / "one", "-o", tmp_path / "back")
    assert status == 0 and "bit for bit" in said
    assert same(bits(load_base(tmp_path / "back").model), bits(load_base(llama_folder).model))
    status, _, error = call("delta", "revert", llama_folder, runs / "one", "-o", tmp_path / "no")
    assert status == 2 and "does not hold this delta's values" in error and not (tmp_path / "no").exists()


def test_compose_diff_and_restrict(runs, call, tmp_path, llama_folder):
    base = load_base(llama_folder)
    one, two = (Delta.load(runs / name / "specialist", base) for name in ("one", "two"))
    assert call("delta", "compose", runs / "one", runs / "two", "-o", tmp_path / "both")[0] == 0
    assert Delta.load(tmp_path / "both") == one.compose(two)
    assert call("delta", "compose", tmp_path / "both", "--minus", runs / "two", "-o", tmp_path / "less")[0] == 0
    assert Delta.load(tmp_path / "less") == one.compose(two).minus(two)
    assert call("delta", "apply", runs / "one", runs / "two", "-o", tmp_path / "model")[0] == 0
    assert call("delta", "diff", llama_folder, tmp_path / "model", "-o", tmp_path / "diff")[0] == 0
    assert Delta.load(tmp_path / "diff") == one.compose(two).changed()
    assert call("delta", "diff", llama_folder, tmp_path / "both", "-o", tmp_path / "same")[0] == 0
    assert Delta.load(tmp_path / "same") == one.compose(two).changed()
    assert call("delta", "restrict", runs / "one", runs / "two", "-o", tmp_path / "common")[0] == 0
    assert Delta.load(tmp_path / "common") == one.restrict(two.selection)
    status, _, error = call(
        "delta", "revert", tmp_path / "model", runs / "one", "-o", tmp_path / "no"
    )  # the other one is on it too
    assert status == 2 and "does not hold" in error


def test_a_model_with_two_disjoint_deltas_is_not_the_base_when_one_is_taken_out(call, tmp_path, llama_folder):
    base = load_base(llama_folder)
    whole = Delta.of(base, disturbed(base.model, 1))
    half = whole.restrict(Selection.of(base.model, list(base.anatomy.blocks[0].parameters)))
    whole.save(tmp_path / "whole")
    half.save(tmp_path / "half")
    assert call("delta", "apply", tmp_path / "whole", "-o", tmp_path / "model")[0] == 0
    status, _, error = call("delta", "revert", tmp_path / "model", tmp_path / "half", "-o", tmp_path / "no")
    assert status == 2 and f"{whole.count() - half.count():,} more entries differ" in error and not (tmp_path / "no").exists()


def test_convert_there_and_back(call, tmp_path, llama_folder):
    base = load_base(llama_folder)
    delta = Delta.of(base, disturbed(base.model, 1, size=1e-5)).restrict(linears(base))
    delta.save(tmp_path / "delta")
    assert call("delta", "convert", tmp_path / "delta", "-o", tmp_path / "shira")[0] == 0
    assert json.loads((tmp_path / "shira" / "adapter_config.json").read_text())["peft_type"] == "SHIRA"
    assert set(load_file(tmp_path / "shira" / "adapter_model.safetensors"))
    assert call("delta", "convert", tmp_path / "shira", "-o", tmp_path / "back", "--to", "delta")[0] == 0
    back = Delta.load(tmp_path / "back")
    assert back.selection == delta.selection
    for name, part in back.selection.parts.items():
        torch.testing.assert_close(back.after[name], part.take(delta._spread(name, delta.after[name])), rtol=0, atol=1e-7)


MISTAKES = {
    "no such run": (["selection", "show", "none"], ["none", "no such run or file"]),
    "a folder with nothing in it": (["selection", "show", "EMPTY"], ["holds no selection"]),
    "a file that is something else": (["selection", "show", "DATA"], ["holds no selection", "selection.safetensors"]),
    "weights that are no selection": (["selection", "show", "WEIGHTS"], ["holds no selection"]),
    "a run that has not chosen": (["selection", "show", "NEW"], ["has not chosen its weights yet", "selectune resume"]),
    "other models": (["selection", "overlap", "ONE", "OTHER"], ["one model"]),
    "no such delta": (["delta", "apply", "none", "-o", "x"], ["none", "no such run or delta"]),
    "a LoRA run": (["delta", "apply", "LORA", "-o", "x"], ["was not trained in place (its form is lora)", "form: full"]),
    "a run that is not trained": (["delta", "apply", "NEW", "-o", "x"], ["is not trained yet", "selectune resume"]),
    "another base": (["delta", "apply", "ONE", "--base", "QWEN", "-o", "x"], ["another base"]),
    "no such base": (["delta", "apply", "ONE", "--base", "qwenn", "-o", "x"], ["no such base"]),
    "something is there": (["delta", "compose", "ONE", "-o", "EMPTY"], ["is there already"]),
    "another architecture": (["delta", "diff", "QWEN", "LLAMA", "-o", "x"], ["is no specialist of"]),
    "whole blocks as SHiRA": (["delta", "convert", "ONE", "-o", "x"], ["SHiRA", "linear layer"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, runs, call, tmp_path, tiny_folders):
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "recipe.yaml").write_text((runs / "one" / "recipe.yaml").read_text())
    Selection({"model.layers.2.mlp.down_proj.weight": Part((3, 3))}).save(tmp_path / "other.safetensors")
    places = {"ONE": runs / "one", "LORA": runs / "lora", "EMPTY": tmp_path / "empty", "DATA": runs / "data.jsonl", "NEW": tmp_path / "new",
              "QWEN": tiny_folders["qwen2"], "LLAMA": tiny_folders["llama"], "OTHER": tmp_path / "other.safetensors",
              "WEIGHTS": tiny_folders["llama"] / "model.safetensors", "x": tmp_path / "x"}  # fmt: skip
    arguments, expected = MISTAKES[name]
    status, said, error = call(*(places.get(part, part) for part in arguments))
    assert status == 2 and error.count("\n") == 1 and error.startswith("selectune: ") and "Picture" not in said
    for part in expected:
        assert part in error, error
    assert not (tmp_path / "x").exists()
