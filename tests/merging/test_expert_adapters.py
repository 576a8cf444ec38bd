"""Several sets of tuned experts on one mixture: the faithful-if lines of the card."""

import pytest
import torch

from selectune import catalogue
from selectune.adapters import load_specialist
from selectune.errors import UserError
from selectune.merging.expert_adapters import ExpertPool
from selectune.models import load_base
from selectune.parameters.factors.routing import selection_of
from tests.contracts.test_forms_and_parameters import select, train_a_little
from tests.tiny import save_tiny

CHOSEN = {"law": {0: [1], 2: [0, 3]}, "care": {0: [1, 2], 1: [3]}}


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def setting(request, tmp_path):
    folder = save_tiny(request.param, tmp_path / "base")
    for name, chosen in CHOSEN.items():
        base = load_base(folder)
        selection = selection_of(base.model, base.anatomy, chosen)
        form = catalogue.create("adapters", "full")
        model = form.apply(base, selection, 0)
        train_a_little(model, base, steps=2 if name == "law" else 4)
        (tmp_path / name).mkdir()
        form.save(model, base, selection, tmp_path / name)
    return folder, tmp_path


@torch.no_grad()
def test_a_mixed_batch_is_what_each_merged_specialist_gives(setting):
    folder, specialists = setting
    ids = torch.randint(3, 300, (4, 17), generator=torch.Generator().manual_seed(0))
    plain = load_base(folder).model(input_ids=ids).logits
    pool = ExpertPool(load_base(folder))
    for name in CHOSEN:
        pool.add(name, specialists / name)
    order = ["law", None, "care", "law"]
    with pool.serving(order) as model:
        mixed = model(input_ids=ids).logits
        generated = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=2)
    for row, name in enumerate(order):
        merged = load_base(folder).model if name is None else load_specialist(load_base(folder), specialists / name)
        assert torch.allclose(mixed[row], merged(input_ids=ids[row : row + 1]).logits[0], atol=1e-4)
        alone = merged.generate(ids[row : row + 1], max_new_tokens=4, do_sample=False, pad_token_id=2)
        assert torch.equal(generated[row], alone[0])
        assert name is None or not torch.allclose(mixed[row], plain[row], atol=1e-2)
    assert torch.allclose(pool.model(input_ids=ids).logits, plain, atol=1e-5)


def test_memory_is_that_of_the_base_and_the_tuned_experts(setting):
    folder, specialists = setting
    base = load_base(folder)
    before = sum(value.numel() for value in base.model.parameters())
    expert = sum(base.anatomy.sizes[key] for key in base.anatomy.blocks[0].expert_parameters) // 4
    pool = ExpertPool(base)
    for name in CHOSEN:
        pool.add(name, specialists / name)
    assert sum(value.numel() for value in pool.model.parameters()) == before + 6 * expert


def test_what_does_not_fit_is_refused(setting, tmp_path):
    folder, specialists = setting
    base = load_base(folder)
    pool = ExpertPool(base)
    pool.add("law", specialists / "law")
    with pytest.raises(UserError, match="already"):
        pool.add("law", specialists / "care")
    with pytest.raises(UserError, match="no tuned experts are called 'lww'"), pool.serving(["lww"]):
        pass
    other = load_base(folder)
    selection = select("last_blocks", other)
    form = catalogue.create("adapters", "full")
    (tmp_path / "blocks").mkdir()
    form.save(form.apply(other, selection, 0), other, selection, tmp_path / "blocks")
    with pytest.raises(UserError, match="holds no tuned experts"):
        pool.add("blocks", tmp_path / "blocks")
