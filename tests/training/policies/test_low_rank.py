"""Policies on low-rank adapters: RoseLoRA and FSLoRA, the faithful-if lines of their cards."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from selectune.errors import UserError
from selectune.training.policies import roselora
from selectune.training.policies.fslora import FSLoRA, _sketched, sketch
from selectune.training.policies.low_rank import Factors
from selectune.training.policies.roselora import RoseLoRA, density_at, kept
from tests.training.policies.running import blocks, run, same

LORA = {"choose": blocks, "form": "lora:rank=4"}


def trained(ran):
    return {name: value for name, value in ran.after.items() if "lora_" in name}


def test_the_schedule_is_cubic():
    assert density_at(9, 10, 60, 0.1) == 1
    assert density_at(10, 10, 60, 0.1) == 1
    assert density_at(35, 10, 60, 0.1) == pytest.approx(0.1 + 0.9 * 0.5**3)
    assert density_at(60, 10, 60, 0.1) == density_at(99, 10, 60, 0.1) == 0.1


def test_each_row_keeps_its_most_sensitive_entries():
    scores = torch.rand(5, 20, generator=torch.Generator().manual_seed(0))
    scores[0] = 1.0
    for share, count in ((0.1, 2), (0.33, 7), (0.99, 20), (1.0, 20)):
        for row, mask in zip(scores.tolist(), kept(scores, share)):
            assert mask.nonzero().squeeze(-1).tolist() == sorted(sorted(range(20), key=lambda i: (-row[i], i))[:count])


def test_sensitivities_are_smoothed_and_the_largest_of_each_row_of_a_and_column_of_b_stay(monkeypatch):
    down = torch.nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    up = torch.nn.Parameter(-down.detach().t().clone())
    one = Factors(torch.nn.Identity(), "down", down, "up", up)
    monkeypatch.setattr(roselora, "factors", lambda stage, policy: {"layer": one})
    stage = SimpleNamespace(tensors={}, step=6, steps=10)
    policy = RoseLoRA(density=0.5)
    for gradient in ([4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]):
        down.grad, up.grad = torch.tensor([gradient]), torch.tensor([gradient]).t()
        policy.gradients(stage)
    smoothed = torch.tensor([[3.4, 5.2, 5.4, 4.0]])  # 0.8 x [4, 6, 6, 4] + 0.2 x [1, 2, 3, 4]
    assert torch.allclose(stage.tensors["down"], smoothed) and torch.allclose(stage.tensors["up"], smoothed.t())
    with torch.no_grad():
        policy.after_step(stage)
    assert down.tolist() == [[0, 2, 3, 0]] and up.t().tolist() == [[0, -2, -3, 0]]


def test_roselora_ends_at_its_density_whichever_checkpoint_is_best(tmp_path, llama_folder):
    settings = {**LORA, "keep_best": True, "evaluations": 6, "rate": 3.0}  # which is best at step 3
    made = run(tmp_path, llama_folder, {"method": "roselora", "density": 0.25, "start": 0.2}, **settings)
    assert made.result.best_step is None and made.result.dev_loss > 0
    found = trained(made)
    assert len(found) == 2 * 4 * 7
    for name, value in found.items():
        rows = value if "lora_A" in name else value.t()
        assert ((rows != 0).sum(1) <= -(-rows.shape[1] // 4)).all()
        assert (rows != 0).any()
    for name in found:
        if "lora_A" in name:
            product = found[name.replace("lora_A", "lora_B")] @ found[name]
            assert (product != 0).float().mean() <= 4 * 0.25**2 + 1e-6


def test_without_pruning_it_is_lora(tmp_path, llama_folder):
    plain = run(tmp_path / "plain", llama_folder, **LORA)
    assert same(run(tmp_path / "a", llama_folder, {"method": "roselora", "density": 1.0}, **LORA).after, plain.after)
    assert same(run(tmp_path / "b", llama_folder, {"method": "fslora", "ranks": 1.0}, **LORA).after, plain.after)
    assert not same(run(tmp_path / "c", llama_folder, {"method": "fslora"}, **LORA).after, plain.after)


def test_the_sketch_is_the_product_on_average():
    drawn = {}
    for seed in range(200):
        one = sketch(4, 0.5, torch.Generator().manual_seed(seed))
        drawn[tuple(one.nonzero().squeeze(-1).tolist())] = one
    assert sorted(drawn) == sorted(combinations(range(4), 2))  # all pairs are drawn, and equally weighed they give the identity
    assert torch.equal(torch.stack(list(drawn.values())).mean(0), torch.ones(4))
    down, up, sketches, found = torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(4, 5, bias=False), {}, []
    down.register_forward_hook(_sketched(sketches, "layer"))
    states = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    for one in drawn.values():
        sketches["layer"] = one
        found.append(up(down(states)))
    assert torch.allclose(torch.stack(found).mean(0), states @ (up.weight @ down.weight).T, atol=1e-6)
    assert torch.allclose(up(down.eval()(states)), states @ (up.weight @ down.weight).T, atol=1e-6)


def test_ranks_that_are_not_drawn_stay_bit_for_bit(tmp_path, llama_folder, monkeypatch):
    seen = []
    plain = FSLoRA.after_step

    def watch(self, stage):
        plain(self, stage)
        for name, (still, down, up) in stage.passing["held"].items():
            value = stage.parameters[f"{name}.lora_A.default.weight"]
            seen.append(
                (
                    torch.equal(value[still], down),
                    torch.equal(stage.parameters[f"{name}.lora_B.default.weight"][:, still], up),
                    int(still.sum()),
                )
            )

    monkeypatch.setattr(FSLoRA, "after_step", watch)
    run(tmp_path, llama_folder, {"method": "fslora", "every": 2}, weight_decay=0.5, **{k: v for k, v in LORA.items()})
    assert all(one and other and count == 2 for one, other, count in seen) and len(seen) == 6 * 28


def test_resumed_runs_are_the_same(tmp_path, llama_folder):
    import shutil

    for policy in ("roselora", "fslora"):
        whole = run(tmp_path / policy / "whole", llama_folder, {"method": policy}, **LORA)
        kept_at = "checkpoints/checkpoint-3"
        shutil.copytree(tmp_path / policy / "whole" / kept_at, tmp_path / policy / "cut" / kept_at)
        assert same(run(tmp_path / policy / "cut", llama_folder, {"method": policy}, **LORA).after, whole.after)


def test_they_need_low_rank_adapters(tmp_path, llama_folder):
    for policy in ("roselora", "fslora"):
        with pytest.raises(UserError, match="low-rank adapters"):
            run(tmp_path / policy, llama_folder, policy)
    with pytest.raises(ValueError, match="after it starts"):
        RoseLoRA(start=0.5, stop=0.4)


def test_a_span_at_the_very_end_prunes_at_its_last_step():
    assert RoseLoRA(start=0.1, stop=0.6).span(SimpleNamespace(steps=50)) == pytest.approx((5, 30))
    begin, end = RoseLoRA(start=0.9, stop=1.0).span(SimpleNamespace(steps=5))
    assert begin <= end == 4 and density_at(4, begin, end, 0.1) == 0.1
    assert kept(torch.tensor([[float("nan"), 1.0, 2.0]]), 0.34).tolist() == [[0.0, 1.0, 1.0]]
