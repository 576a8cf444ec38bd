"""The contract of what happens after training, and the chain with it: each weight is the specialist's, the base's or a repair's."""

import copy

import pytest
import torch

from selectune import catalogue, pipeline
from selectune.adapters import load_specialist
from selectune.data import Encoder, Message, Record
from selectune.errors import UserError
from selectune.merging.export import merged
from selectune.meter import Meter
from selectune.models import load_base
from selectune.parameters import Context
from tests.test_end_to_end import ROWS, VALUES
from tests.test_mistakes import lines, put
from tests.tiny import ARCHITECTURES

METHODS = catalogue.methods("merging")
SMALL = {"steps": 3, "warm_up": 1, "every": 2, "examples": 4, "rate": 0.01}
RECORDS = [
    Record("chat", (Message("user", f"What is fault {i}?"), Message("assistant", f"Fault {i} means that lamp {i * 7} is on.")))
    for i in range(6)
]


def make(name, **values):
    known = METHODS[name].model_fields
    return catalogue.create("merging", {"method": name} | {key: value for key, value in (SMALL | values).items() if key in known})


def trained(folder, seed=1):
    """A base, and a copy of which everything has moved a little."""
    base = load_base(folder, dtype=torch.float32)
    model = copy.deepcopy(base.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.05 * value.std().nan_to_num(0.1) * torch.randn(value.shape, generator=generator)
    return base, model


def finished(name, base, model, **values):
    context = Context(
        base, Encoder(base.tokenizer, 128), RECORDS, RECORDS[:3], torch.Generator().manual_seed(0), Meter("finish"), quiet=True
    )
    after = copy.deepcopy(model)
    return after, make(name, **values).finish(after, context)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("name", [name for name in METHODS if name != "repair"])  # which has values of its own
def test_every_weight_is_the_specialists_or_the_bases(name, architecture, tiny_folders):
    base, model = trained(tiny_folders[architecture])
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    after, told = finished(name, base, model)
    again, _ = finished(name, base, model)
    originals, values, returned = dict(base.model.named_parameters()), dict(model.named_parameters()), 0
    for key, value in after.named_parameters():
        assert ((value == values[key]) | (value == originals[key])).all(), key
        assert torch.equal(value, dict(again.named_parameters())[key]), key
        returned += int((value != values[key]).sum())
    assert all(torch.equal(value, before[key]) for key, value in base.model.state_dict().items())
    assert (returned > 0) == (name != "none")
    assert "weights returned" not in told or 0.9 * returned <= told["weights returned"] <= returned / 0.9


def test_a_repair_tunes_what_moved_most_and_leaves_the_rest(llama_folder):
    base, model = trained(llama_folder)
    with torch.no_grad():
        for block in base.anatomy.blocks:  # one kind moved far, the rest hardly
            for name in block.parameters:
                own, origin = dict(model.named_parameters())[name], dict(base.model.named_parameters())[name]
                own.copy_(origin + (1.0 if "k_proj" in name else 1e-4) * (own - origin))
    after, told = finished("repair", base, model, density=0.05)
    again, _ = finished("repair", base, model, density=0.05)
    values, tuned = dict(model.named_parameters()), 0
    for name, value in after.named_parameters():
        assert torch.equal(value, dict(again.named_parameters())[name])
        if not torch.equal(value, values[name]):
            assert "k_proj" in name
            tuned += value.numel()
    assert (
        0 < tuned == told["weights tuned"] <= 0.05 * sum(base.anatomy.sizes[n] for b in base.anatomy.blocks for n in b.parameters)
    )
    with pytest.raises(UserError, match="moved nothing in the blocks"):
        finished("repair", base, base.model)


def test_half_returns_of_each_kind_in_each_block(llama_folder):
    base, model = trained(llama_folder)
    after, _ = finished("half_reset", base, model)
    originals, values = dict(base.model.named_parameters()), dict(after.named_parameters())
    for block in base.anatomy.blocks:
        attention = [torch.equal(values[name], originals[name]) for name in block.parameters if "self_attn" in name]
        assert len(attention) == 4 and sum(attention) == 2
    assert not torch.equal(values["model.embed_tokens.weight"], originals["model.embed_tokens.weight"])


def test_the_random_control_returns_its_share(llama_folder):
    base, model = trained(llama_folder)
    changed = sum(int((a != b).sum()) for a, b in zip(model.parameters(), base.model.parameters(), strict=True))
    for share in (0.0, 0.3, 1.0):
        after, told = finished("random_reset", base, model, share=share)
        left = sum(int((a != b).sum()) for a, b in zip(after.parameters(), base.model.parameters(), strict=True))
        assert abs(left - (1 - share) * changed) <= 1 and told["weights returned"] == changed - left


def test_recovery_brings_general_prompts_back_within_its_tolerance(llama_folder):
    base, model = trained(llama_folder)
    _, told = finished("recovery", base, model, rate=0.05, steps=6, tolerance=10.0)
    first, last = told["similarity to the base, first and last step"]
    assert last > first and told["steps"] == 6
    _, told = finished("recovery", base, model, tolerance=0.0, rate=0.2)
    assert told["rolled back"] == "yes" or told["steps"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["full", "lora", "qlora"])
def test_a_run_is_finished_and_can_be_taken_back(form, tmp_path, llama_folder, monkeypatch):
    monkeypatch.setenv("SELECTUNE_CACHE", str(tmp_path / "cache"))
    put(tmp_path, "data.jsonl", lines(ROWS))
    values = {**VALUES, "base": str(llama_folder), "output": str(tmp_path / "runs"), "form": form}
    run = pipeline.specialize(
        str(tmp_path / "data.jsonl"), recipe=values, finish="random_reset:share=1.0", name="all", quiet=True
    )
    assert [cost.stage for cost in run.costs()][4] == "finish"
    base = load_base(llama_folder, dtype=torch.float32)
    model = load_specialist(load_base(llama_folder, dtype=torch.float32), run.path("specialist"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.model.parameters(), strict=True))
    assert "Afterwards" in run.path("report.html").read_text() and "random_reset" in run.path("report.html").read_text()
    drift = pipeline.verdict_of(run)
    assert next(row for row in drift.differences if row.benchmark == "forgetting/kl").difference == pytest.approx(0, abs=1e-6)
    recipe = run.path("recipe.yaml")
    recipe.write_text(recipe.read_text().replace("share: '1.0'", "share: '0.5'").replace("share=1.0", "share=0.5"))
    pipeline.resume(run.folder, quiet=True)
    half = merged(load_base(llama_folder, dtype=torch.float32), run.path("specialist"))
    whole = merged(load_base(llama_folder, dtype=torch.float32), run.path("trained"))
    moved, kept = (
        sum(int((a != b).sum()) for a, b in zip(one.parameters(), base.model.parameters(), strict=True)) for one in (whole, half)
    )
    assert 0 < kept <= 0.5 * moved + 1
    recipe.write_text(recipe.read_text().replace("random_reset:share=0.5", "none"))
    pipeline.resume(run.folder, quiet=True)
    assert not run.path("trained").exists() and not run.finished("finish")


def test_a_form_that_changes_no_weights_is_refused_before_any_work(tmp_path, llama_folder):
    put(tmp_path, "data.jsonl", lines(ROWS))
    with pytest.raises(UserError, match="changes no weights of the base") as error:
        pipeline.specialize(
            str(tmp_path / "data.jsonl"),
            base=str(llama_folder),
            form="lofit",
            finish="recovery",
            output=str(tmp_path),
            quiet=True,
        )
    assert "\n" not in str(error.value)
