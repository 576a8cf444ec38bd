"""SparseGrad: its bases, what it keeps, and that keeping everything is plain descent."""

import pytest
import torch

from selectune.errors import UserError
from selectune.parameters import Selection
from selectune.parameters.factors.gradients import each_gradient
from selectune.training.policies.sparsegrad import SparseGrad, concentration, directions
from tests.training.policies.running import blocks, run


def test_directions_are_those_of_the_unfoldings_and_orthogonal():
    torch.manual_seed(0)
    bank = torch.randn(6, 8, 5)
    left, right = directions(sum(g @ g.T for g in bank)), directions(sum(g.T @ g for g in bank))
    for found, unfolded in ((left, bank.permute(1, 0, 2).reshape(8, -1)), (right, bank.permute(2, 0, 1).reshape(5, -1))):
        vectors = torch.linalg.svd(unfolded.double()).U
        assert torch.allclose(found @ found.T, torch.eye(len(found)), atol=1e-5)
        assert torch.allclose((found.double() * vectors).sum(0).abs(), torch.ones(len(found), dtype=torch.float64), atol=1e-4)


def test_all_entries_by_plain_descent_are_descent_on_the_weights(tmp_path, llama_folder, monkeypatch):
    steps = []
    original = SparseGrad.gradients

    def watch(self, stage):
        before = {name: stage.parameters[name].grad.clone() for name in self._roles(stage)}
        original(self, stage)
        for name, gradient in before.items():
            assert stage.parameters[name].grad is None
            steps.append((gradient, stage.passing["sparsegrad"][name], stage.tensors, self._roles(stage)[name]))

    monkeypatch.setattr(SparseGrad, "gradients", watch)
    run(tmp_path / "all", llama_folder, "sparsegrad:share=1,optimiser=sgd,examples=2", choose=blocks, steps=2)
    assert all(torch.allclose(update, gradient, atol=1e-5) for gradient, update, *_ in steps)
    steps.clear()
    run(tmp_path / "few", llama_folder, "sparsegrad:share=0.01,examples=2", choose=blocks, steps=2)
    for gradient, update, tensors, role in steps:
        left, right = tensors[f"left/{role}"], tensors[f"right/{role}"]
        turned = left.T @ update @ right
        kept = turned.abs() > 1e-4 * turned.abs().max()
        count = round(0.01 * gradient.numel())
        assert int(kept.sum()) == count
        expected = (left.T @ gradient @ right).abs().view(-1).topk(count).indices
        assert set(kept.view(-1).nonzero().view(-1).tolist()) == set(expected.tolist())
    first = steps[0][1]
    left, right = steps[0][2][f"left/{steps[0][3]}"], steps[0][2][f"right/{steps[0][3]}"]
    turned = left.T @ first @ right
    assert torch.allclose(turned[turned.abs() > 0.5].abs(), torch.ones(()), atol=1e-2)  # Adam's first step has size 1


@pytest.mark.parametrize("share", [0.01, 1])
def test_other_weights_step_as_ever_and_the_mlp_otherwise_even_with_all_entries(share, tmp_path, llama_folder):
    """Adam is another in another basis."""
    options = {"choose": blocks, "steps": 1, "clip_norm": 1e9, "weight_decay": 0.0}
    plain, ours = (
        run(tmp_path / "a", llama_folder, **options),
        run(tmp_path / "b", llama_folder, f"sparsegrad:examples=2,share={share}", **options),
    )
    for name, value in plain.after.items():
        if ".layers." not in name:
            continue
        as_ever = torch.allclose(value, ours.after[name], atol=1e-3) if "mlp" in name else torch.equal(value, ours.after[name])
        assert as_ever != ("mlp" in name), name
        assert not torch.equal(ours.after[name], plain.base[name])


def test_without_whole_matrices_of_the_mlp_it_is_refused(tmp_path, llama_folder):
    def attention(model):
        return Selection.of(model, [name for name, _ in model.named_parameters() if "self_attn" in name])

    with pytest.raises(UserError, match="no matrix of the MLP"):
        run(tmp_path, llama_folder, "sparsegrad", choose=attention)


def test_gradients_are_sparser_where_they_are_turned():
    from tests.tiny import tiny

    model, found = tiny("llama"), []
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 300, (20,)), "position_ids": torch.arange(20)} for _ in range(4)]
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    names = [f"model.layers.{block}.mlp.up_proj.weight" for block in range(4)]
    each_gradient(model, rows, names, lambda name, gradient, tokens: found.append(gradient.clone()))
    left, right = directions(sum(g @ g.T for g in found)), directions(sum(g.T @ g for g in found))
    plain, turned = (sum(map(concentration, several)) for several in (found, [left.T @ g @ right for g in found]))
    assert turned < plain
    assert concentration(torch.tensor([3.0, 1.0, 0, 0])) == 0.25 and concentration(torch.ones(10)) == pytest.approx(0.9)
