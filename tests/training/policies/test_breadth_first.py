"""Breadth first: what is known is passed over, and training ends when an epoch was."""

import json
from itertools import pairwise

import torch
from torch.nn import functional

from selectune.data import Encoder, pack
from selectune.models import load_base
from selectune.training.policies.breadth_first import mean
from tests.training.policies.running import RECORDS, blocks, run, same
from tests.training.policies.staged import batch, make, stage


def stepped(one, enough, halves):
    """One optimiser step, as the trainer makes it."""
    policy = make(f"breadth_first:enough={enough}")
    policy.before_step(one)
    one.clear()
    for half in halves:
        policy.loss(one, half, lambda half=half: one.mean_loss(half) / len(halves)).backward()
    policy.gradients(one)
    one.optimiser.step()


def test_a_known_batch_changes_neither_weights_nor_moments():
    one, halves = stage(), [batch(1, seed=1), batch(1, seed=2)]
    loss = sum(one.mean_loss(half).item() for half in halves) / 2
    stepped(one, loss - 0.01, halves)
    loss = sum(one.mean_loss(half).item() for half in halves) / 2
    before, moments = one.values(), [value.clone() for state in one.optimiser.state.values() for value in state.values()]
    assert moments
    stepped(one, loss + 0.01, halves)
    assert same(one.values(), before)
    assert all(map(torch.equal, moments, [value for state in one.optimiser.state.values() for value in state.values()]))
    stepped(one, loss - 0.01, halves)
    assert not same(one.values(), before)


def test_an_epoch_of_known_batches_is_the_last(tmp_path, llama_folder):
    known = run(tmp_path / "a", llama_folder, "breadth_first:enough=99", steps=30)
    assert 1 < known.result.steps < 15
    assert same(known.after, known.base)
    assert run(tmp_path / "b", llama_folder, "breadth_first:enough=0.0", steps=30).result.steps == 30


def test_training_ends_after_the_first_epoch_below_the_limit(tmp_path, llama_folder):
    enough, most = 2.7, 60
    made = run(tmp_path, llama_folder, f"breadth_first:enough={enough}", steps=most, evaluations=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    epoch = run(tmp_path / "one", llama_folder, "breadth_first:enough=99", steps=most).result.steps
    assert epoch < made.result.steps < most and made.result.steps % epoch == 0 and len(losses) == made.result.steps
    means = [sum(losses[start : start + epoch]) / epoch for start in range(0, len(losses), epoch)]
    assert means[-1] < enough < means[-2]
    assert "eval_loss" in lines[-1] or "eval_loss" in lines[-2], "what is left is measured, and may be the best"
    assert (tmp_path / "checkpoints" / f"checkpoint-{made.result.steps}").is_dir()


def test_one_batch_of_all_records_is_one_step_of_adamw_on_the_mean_loss_of_their_tokens(tmp_path, llama_folder):
    base = load_base(llama_folder, dtype=torch.float32)
    encoder = Encoder(base.tokenizer, 64)
    rows = pack([piece for record in RECORDS for piece in encoder.encode(record)], 64)[:-2]  # as the run packs them
    made = run(tmp_path, llama_folder, "breadth_first:enough=0", choose=blocks, steps=1, rate=1e-3, weight_decay=0.0, clip_norm=None,
               evaluations=0, batch_sequences=len(rows), micro_batch_sequences=1)  # fmt: skip
    weights = {name: base.model.get_parameter(name).requires_grad_(True) for name in made.selection.names()}
    total, tokens = 0.0, 0
    for row in rows:
        starts = [*(row["position_ids"] == 0).nonzero().view(-1).tolist(), 64]
        for start, end in pairwise(starts):  # each record by itself
            ids, labels = row["input_ids"][start:end], row["labels"][start + 1 : end]
            total += functional.cross_entropy(base.model(input_ids=ids[None]).logits[0, :-1], labels, reduction="sum")
            tokens += int((labels != -100).sum())
    (total / tokens).backward()
    torch.optim.AdamW(weights.values(), lr=1e-3, weight_decay=0.0).step()
    for name, value in weights.items():
        assert not torch.equal(made.after[name], made.base[name])
        assert torch.isclose(made.after[name], value, atol=1e-6).float().mean() > 0.999, name  # but where a gradient is rounding


def test_what_was_done_stays_done():
    one = stage()
    policy = make("breadth_first:enough=1")
    one.numbers["losses"] = [(0.5, 10), (1.9, 1)]
    assert policy.done(one)
    one.numbers["losses"] = [(5.0, 1)]
    assert policy.done(one)
    before = one.values()
    one.numbers["epoch"], one.epoch = 3, 4
    stepped(one, 0.0, [batch(1)])
    assert same(one.values(), before)


def test_the_mean_of_an_epoch_is_over_its_tokens():
    assert mean([(1.0, 1), (2.0, 3)]) == 1.75
