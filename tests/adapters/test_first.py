"""FiRST: the faithful-if lines of the card."""

import shutil
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from selectune import catalogue
from selectune.adapters.attached import attachments
from selectune.adapters.first import BlockRouter, LowRank
from selectune.errors import UserError
from selectune.models import load_base
from selectune.parameters import Selection
from selectune.training.policies.first import FiRSTStages
from selectune.training.trainer import WEIGHTS
from tests.contracts.test_forms_and_parameters import logits
from tests.training.policies.running import blocks, run, same


def routed(folder, form="first"):
    base = load_base(folder)
    model = catalogue.create("adapters", form).apply(base, Selection.all(base.model), 0)
    return model, {name: one for name, one in attachments(model).items() if isinstance(one, BlockRouter)}


@torch.no_grad()
def test_a_skipped_block_is_as_if_it_were_not_there(llama_folder):
    model, routers = routed(llama_folder, "first:first_blocks=1")
    assert list(routers) == [f"model.layers.{block}" for block in (1, 2, 3)]
    routers["model.layers.2"].decide = lambda states, positions: torch.zeros(states.shape[:2])
    plain = load_base(llama_folder).model
    del plain.model.layers[2]
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)


@torch.no_grad()
def test_with_every_block_kept_it_is_the_base_with_its_adapters(llama_folder):
    model, routers = routed(llama_folder, "first:first_blocks=0")
    plain, generator = load_base(llama_folder).model, torch.Generator().manual_seed(0)
    before = logits(plain)
    adapters = {name: one for name, one in attachments(model).items() if isinstance(one, LowRank)}
    for name, one in adapters.items():
        one.up += 0.1 * torch.randn(one.up.shape, generator=generator)
        plain.get_submodule(name).weight += 2 * one.up @ one.down
    assert torch.allclose(logits(model), logits(plain), atol=2e-3, rtol=1e-4)
    assert not torch.allclose(logits(plain), before, atol=0.1)
    assert len(adapters) == 4 * 7 and all(float(one.decision) == 1 for one in routers.values())


def test_the_first_steps_of_a_router_keep_every_block(llama_folder):
    model, routers = routed(llama_folder, "first:cost=0.0")
    optimiser = torch.optim.AdamW([value for one in routers.values() for value in one.parameters()], lr=1e-3)
    for _ in range(3):
        logits = model(input_ids=torch.arange(3, 20)[None], use_cache=False).logits
        logits.logsumexp(-1).mean().backward()
        optimiser.step()
        assert all(float(one.decision) == 1 for one in routers.values())


@torch.no_grad()
def test_the_blocks_that_are_skipped_stay_the_same_while_text_is_generated(llama_folder):
    model, routers = routed(llama_folder, "first:first_blocks=1")
    generator = torch.Generator().manual_seed(1)
    for one in routers.values():
        one.weight += torch.randn(64, generator=generator)
        one.bias.zero_()
    ids = torch.arange(3, 20)[None]
    told = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2)
    model(input_ids=ids, use_cache=False)
    decisions = {name: one.decision.clone() for name, one in routers.items()}
    assert 0 < sum(float(value) for value in decisions.values()) < 3
    for name, one in routers.items():
        one.decide = lambda states, positions, kept=decisions[name]: kept[:, None].expand(states.shape[:2])
    text = ids
    for _ in range(6):
        text = torch.cat([text, model(input_ids=text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(told, text)


@torch.no_grad()
def test_what_no_record_keeps_is_not_computed_and_the_result_is_the_same(llama_folder):
    model, routers = routed(llama_folder, "first:first_blocks=1")
    ids, seen = torch.arange(3, 43).view(2, 20), []
    model.model.layers[2].mlp.up_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel() // 64))
    router = routers["model.layers.2"]
    positions = torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1)
    records = (positions == 0).cumsum(1)
    some = torch.stack([records[0] == 2, records[1] == 1]).float()
    for gate, tokens in ((torch.zeros(2, 20), []), (some, [20]), (torch.ones(2, 20), [40])):
        router.decide = lambda states, positions, gate=gate: gate
        router.narrowed = lambda layer, gate: nullcontext()
        router.returns = None  # as before the first call: computed, and left out
        whole = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        del router.narrowed
        seen.clear()
        assert torch.allclose(model(input_ids=ids, position_ids=positions, use_cache=False).logits, whole, atol=1e-5, rtol=0)
        assert seen == tokens
        if not gate.any():
            assert torch.equal(model(input_ids=ids, position_ids=positions, use_cache=False).logits, whole)
    assert "forward" not in model.model.layers[2].mlp.__dict__


def test_routers_train_first_and_stay_bit_for_bit_afterwards(tmp_path, llama_folder, monkeypatch):
    seen = []
    after_step = FiRSTStages.after_step
    monkeypatch.setattr(FiRSTStages, "after_step", lambda self, stage: [seen.append(stage.values()), after_step(self, stage)])
    run(tmp_path / "a", llama_folder, {"method": "first", "routers": 0.5}, choose=blocks, form="first", steps=6, keep_best=True)
    for step in range(1, 6):
        changed = {name for name, value in seen[step].items() if not torch.equal(value, seen[step - 1][name])}
        routers = {name for name in seen[0] if name.endswith(("beside.weight", "beside.bias"))}
        assert changed and (changed <= routers if step < 3 else not changed & routers)
    with pytest.raises(UserError, match="form 'first'"):
        run(tmp_path / "b", llama_folder, "first")


@pytest.mark.parametrize("routers", [0.3, 0.8])
def test_a_checkpoint_of_either_stage_holds_both_and_resumes_to_the_same_bytes(routers, tmp_path, llama_folder):
    policy, settings = {"method": "first", "routers": routers}, {"choose": blocks, "form": "first"}
    whole = run(tmp_path / "whole", llama_folder, policy, **settings)
    kept = "checkpoints/checkpoint-3"
    shutil.copytree(tmp_path / "whole" / kept, tmp_path / "cut" / kept)
    saved = load_file(tmp_path / "cut" / kept / WEIGHTS)
    assert saved.keys() == {name for name in whole.after if ".beside." in name}
    assert same(run(tmp_path / "cut", llama_folder, policy, **settings).after, whole.after)
