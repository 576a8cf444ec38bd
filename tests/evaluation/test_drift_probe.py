"""The drift probe against a slow re-computation without a cache."""

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

import selectune
from selectune.cli import app
from selectune.errors import UserError
from selectune.evaluation.drift_probe import drift_of, mass_on, typical_tokens
from selectune.run import Run
from tests.tiny import tiny

PROMPTS = [[5, 9, 30], [77, 12, 200, 31]]


def slowly(model, prompts, tokens, end, steps):
    """Total and largest mass, each step a whole pass."""
    totals, peaks = [], []
    for prompt in prompts:
        ids, mine, largest = list(prompt), [], []
        for _ in range(steps):
            with torch.no_grad():
                odds = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
            mine.append(sum(float(odds[token]) for token in tokens))
            largest.append(max(float(odds[token]) for token in tokens))
            ids.append(int(odds.argmax()))
            if ids[-1] == end:
                break
        totals.append(sum(mine) / len(mine))
        peaks.append(sum(largest) / len(largest))
    return sum(totals) / len(totals), sum(peaks) / len(peaks)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_mass_is_that_of_the_slow_way(architecture):
    model = tiny(architecture)
    with torch.no_grad():
        third = int(model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())
    for end in (None, third):
        found = mass_on(model, PROMPTS, [7, 8, 9], end=end, steps=6)
        assert (found.total, found.largest) == pytest.approx(slowly(model, PROMPTS, [7, 8, 9], end, 6), rel=1e-4)


def test_the_whole_vocabulary_has_all_and_a_base_no_drift_from_itself():
    model = tiny("llama")
    everything = mass_on(model, PROMPTS, range(model.config.vocab_size), steps=4)
    assert everything.total == pytest.approx(1)
    drift = mass_on(copy.deepcopy(model), PROMPTS, [7], steps=4) - mass_on(model, PROMPTS, [7], steps=4)
    assert drift.total == drift.largest == 0
    with pytest.raises(ValueError, match="prompts"):
        mass_on(model, [], [7])


def test_typical_tokens_are_those_that_the_domain_favours():
    domain, general = [[1, 1, 1, 2, 3]], [[2, 3, 3, 4, 4]]
    assert typical_tokens(domain, general, threshold=1.0) == {1}
    assert typical_tokens(domain, general, threshold=-10) == {1, 2, 3}
    assert typical_tokens(domain, domain, threshold=0) == set()


def test_a_run_is_compared_with_its_base(tmp_path, llama_folder):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"What is fault {i}?", "answer": f"lamp {i}"}) + "\n" for i in range(30)))
    values = {"base": str(llama_folder), "form": "lora", "training": {"max_steps": 12, "evaluations": 0, "batch_sequences": 2, "learning_rate": 0.05},
              "evaluation": {"benchmarks": [], "forgetting": False, "samples": 0, "target_items": 2}, "output": str(tmp_path)}  # fmt: skip
    run = selectune.specialize(str(data), name="learnt", quiet=True, **values)
    found = drift_of(Run.open(run.folder), prompts=3, steps=4)
    assert len(found.base) == len(found.specialist) == 3 and {"la", "mp"} <= set(found.words) and "<|im_end|>" not in found.words
    moved = [after.total - before.total for before, after in zip(found.base, found.specialist, strict=True)]
    low, high = found.interval("total")
    assert sum(moved) / 3 > 0.01 and low <= sum(moved) / 3 <= high  # it says lamp to everything now
    shown = CliRunner().invoke(app, ["drift", str(run.folder), "--prompts", "3", "--steps", "4", "--quiet"])
    assert shown.exit_code == 0 and f"{sum(moved) / 3:+.4f}" in shown.output, shown.output
    with pytest.raises(UserError, match="expected a lower one"):
        drift_of(Run.open(run.folder), prompts=1, threshold=100)
