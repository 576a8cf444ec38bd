"""The frozen beginning, computed once: the same weights to the bit, and only where that is sound."""

import pytest
import torch

from selectune.data import pack
from selectune.recipe import TrainingRecipe
from selectune.training.prefix import PrefixCache, frozen_blocks
from tests.tiny import ARCHITECTURES, tiny
from tests.training.test_training import encoded, run_training


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_weights_with_and_without(architecture, tmp_path):
    found = {}
    for cached in (True, False):
        model = tiny(architecture)
        blocks, _ = frozen_blocks(model)
        calls = []
        blocks[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        inner = [
            module for module in blocks[0].modules() if isinstance(module, torch.nn.Linear) or "Conv1D" in type(module).__name__
        ]
        inner[0].register_forward_hook(lambda *_, calls=calls: calls.append("computed"))
        recipe = TrainingRecipe(batch_sequences=2, micro_batch_sequences=1, evaluations=2, prefix_cache=cached)
        result, weights = run_training(tmp_path / str(cached), recipe, steps=12, model=model)
        found[cached] = (weights, calls.count("computed"), result.skipped_tokens)
    (kept, computed, skipped), (plain, everything, none) = found[True], found[False]
    assert all(torch.equal(kept[name], plain[name]) for name in plain)
    assert skipped > 0 and none == 0 and computed < everything / 2


def test_in_a_file_too(tmp_path):
    model, rows = tiny("llama").requires_grad_(False), pack(encoded(6), 64)
    blocks, frozen = frozen_blocks(model)
    assert frozen == 3  # nothing trains: all but the last
    cache = PrefixCache(blocks, frozen, len(rows) + 5, 1, tmp_path, limit_bytes=0, file_limit_bytes=2 * 64 * 64 * 4)
    for _ in range(2):
        for number, row in enumerate(rows):
            plain = model(input_ids=row["input_ids"][None], use_cache=False).logits
            with cache.batch(torch.tensor([number])):
                assert torch.equal(model(input_ids=row["input_ids"][None], use_cache=False).logits, plain)
    assert cache.skipped_tokens == 2 * 64  # two sequences fit; the others are computed every time
    assert list(tmp_path.rglob("states.bin"))
    cache.close()
    assert not list(tmp_path.rglob("states.bin"))


def test_it_is_off_where_it_would_be_wrong():
    model = tiny("llama")
    model.model.embed_tokens.requires_grad_(True)
    assert frozen_blocks(model)[1] == 0
    model = tiny("llama")
    model.requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    assert frozen_blocks(model)[1] == 2
    model.model.layers[1].self_attn.attention_dropout = 0.1
    assert frozen_blocks(model)[1] == 1
    model = tiny("gpt2", embd_pdrop=0.1)
    model.requires_grad_(False)
    assert frozen_blocks(model)[1] == 0
