"""Exactly the largest gradients of the whole batch are applied."""

import math

import pytest
import torch
from transformers import TrainerCallback

from selectune.training.policies.masked import largest
from tests.training.policies.running import blocks, run, same


class Watch(TrainerCallback):
    """Keeps gradients and weights around the optimiser's step."""

    def __init__(self):
        self.gradients, self.before, self.after = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.gradients.append({n: p.grad.clone() for n, p in trained.items()})
        self.before.append({n: p.detach().clone() for n, p in trained.items()})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_the_mask_is_the_exact_top_with_ties_by_place(share):
    scores = torch.randint(0, 5, (7, 10), generator=torch.Generator().manual_seed(1)).float()
    order = sorted(range(70), key=lambda i: (-float(scores.view(-1)[i]), i))
    mask = torch.zeros(70)
    mask[order[: math.ceil(round(share * 70, 9))]] = 1
    assert torch.equal(largest(scores, share).view(-1), mask)


def test_the_gradient_of_the_batch_is_masked_not_that_of_its_parts(tmp_path, llama_folder):
    settings = {"choose": blocks, "optimiser": "sgd", "weight_decay": 0.0, "clip_norm": None, "steps": 1, "evaluations": 0}
    plain, once, parts = Watch(), Watch(), Watch()
    run(tmp_path / "p", llama_folder, watching=[plain], micro_batch_sequences=4, **settings)
    run(tmp_path / "o", llama_folder, "gradient_mask:keep=0.1", watching=[once], micro_batch_sequences=4, **settings)
    run(tmp_path / "a", llama_folder, "gradient_mask:keep=0.1", watching=[parts], micro_batch_sequences=1, **settings)
    for name, gradient in plain.gradients[0].items():
        kept = once.gradients[0][name]
        size = sorted(gradient.abs().view(-1).tolist(), reverse=True)[math.ceil(0.1 * gradient.numel() - 1e-9) - 1]
        assert (kept != 0).sum() == math.ceil(0.1 * gradient.numel() - 1e-9)
        assert torch.equal(kept, torch.where(gradient.abs() >= size, gradient, 0))
        assert ((parts.gradients[0][name] != 0) == (kept != 0)).float().mean() > 0.999  # but for sums in another order
        assert torch.allclose(parts.gradients[0][name], kept, atol=2e-3)
    assert not same(plain.after[0], once.after[0])


def test_the_norm_that_is_clipped_is_that_of_what_is_applied(tmp_path, llama_folder):
    watch = Watch()
    run(tmp_path, llama_folder, "gradient_mask:keep=0.1", choose=blocks, watching=[watch], steps=1, clip_norm=0.01)
    norm = torch.stack([gradient.norm() for gradient in watch.gradients[0].values()]).norm()
    assert abs(norm - 0.01) < 1e-5


def test_a_masked_update_leaves_the_rest_as_it_was_in_every_step(tmp_path, llama_folder):
    watch = Watch()
    run(tmp_path, llama_folder, "gradient_mask:keep=0.1,mask=update", choose=blocks, watching=[watch], steps=4, clip_norm=None)
    for gradients, before, after in zip(watch.gradients, watch.before, watch.after, strict=True):
        for name, gradient in gradients.items():
            mask = largest(gradient.abs(), 0.1).bool()
            assert torch.equal(after[name][~mask], before[name][~mask])
            assert (after[name][mask] != before[name][mask]).float().mean() > 0.9


def test_nothing_kept_changes_nothing_without_decay(tmp_path, llama_folder):
    ran = run(tmp_path, llama_folder, "gradient_mask:keep=0", weight_decay=0.0)
    assert same(ran.after, ran.base)
