"""Half of the matrices by category, drawn anew."""

import re
from collections import Counter

import pytest

from selectune import catalogue
from selectune.errors import UserError
from selectune.models import load_base
from selectune.parameters import Selection
from tests.tiny import ARCHITECTURES, tiny
from tests.training.policies.running import blocks, run
from tests.training.policies.staged import make, stage
from tests.training.policies.test_layer_sampling import Watch, number


def counts(active, block):
    inside = [name for name in active if f".layers.{block}." in name]
    return tuple(sum(part in name for name in inside) for part in ("self_attn", ".mlp.", "norm"))


def test_the_category_rule():
    one = stage()
    active = make("half").draw(one)
    found = [counts(active, block) for block in range(4)]
    assert all(attention == 2 and norm == 1 for attention, _, norm in found)
    assert sorted(mlp for _, mlp, _ in found) == [1, 1, 2, 2]
    assert "model.embed_tokens.weight" in active
    assert make("half").draw(one) == active
    one.step = 7
    assert make("half").draw(one) != active
    assert "model.embed_tokens.weight" not in make("half:outside=false").draw(one)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_halves(architecture):
    one = stage(tiny(architecture))
    active = make("half").draw(one)
    inside = [name for name in one.parameters if one.block(name) is not None]
    assert 0.25 < sum(name in active for name in inside) / len(inside) < 0.75
    assert set(make("half:share=1").draw(one)) == set(one.parameters)


@pytest.mark.parametrize("form", ["lora:rank=2", "ssf"])
def test_an_adapter_is_drawn_as_the_matrix_that_it_lies_beside(form, llama_folder):
    base = load_base(llama_folder)
    one = stage(catalogue.create("adapters", form).apply(base, blocks(base.model), 0), everything=False)
    active = make("half").draw(one)
    found = [counts(active, block) for block in range(4)]  # each adapter of a matrix has two tensors
    assert all(attention == 4 for attention, _, _ in found) and sorted(mlp for _, mlp, _ in found) == [2, 2, 4, 4]
    layers = [re.split(r"\.(lora_|beside)", name)[0] for name in active if "norm" not in name]
    assert set(Counter(layers).values()) == {2}


def test_other_levels():
    one = stage()
    assert len(number(make("half:level=layer").draw(one))) == 2
    matrices = [name for name in make("half:level=model").draw(one) if ".layers." in name]
    assert len(matrices) == 4 * 9 // 2


def test_a_new_half_each_epoch_and_the_rest_does_not_move(tmp_path, llama_folder):
    watch = Watch()
    run(tmp_path, llama_folder, "half", choose=Selection.all, watching=[watch], steps=9, evaluations=0, clip_norm=None)
    epochs = []
    for changed in watch.changed:
        if not epochs or changed != epochs[-1]:
            epochs.append(changed)
    assert len(epochs) >= 2
    for changed in epochs:
        assert all(counts(changed, block)[0] == 2 for block in range(4))
        assert {sum(counts(changed, block)[1] for block in range(4))} == {6}
    assert run(tmp_path / "b", llama_folder, "half:every=1", choose=blocks, evaluations=0)


def test_a_draw_of_nothing_that_may_train_is_refused(tmp_path, llama_folder):
    def last(model):
        return Selection.of(model, [name for name, _ in model.named_parameters() if ".layers.3." in name])

    with pytest.raises(UserError, match="drew nothing that may train"):
        run(tmp_path, llama_folder, {"method": "half", "level": "layer", "every": 1}, choose=last, steps=12)
