"""B001, the faithful-if lines of its card, against an obvious re-computation."""

import pytest
import torch

from selectune import catalogue
from selectune.adapters.full import Full
from selectune.data import Encoder, Message, Record
from selectune.meter import Meter
from selectune.models import load_base
from selectune.models.attention import attend_by_record
from selectune.parameters import Context, Selection
from selectune.parameters.factors.scores import block_norms, fisher_diagonal
from tests.contracts.test_forms_and_parameters import train_a_little
from tests.tiny import tiny


def examples(count=3):
    torch.manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(3, 200, (12,))
        labels = ids.clone()
        labels[:5] = -100
        made.append((ids, labels))
    return made


def brute_force(model, pairs, scale=1.0):
    names = [name for name, _ in model.named_parameters() if ".layers." in name]
    total = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    for ids, labels in pairs:
        model.zero_grad()
        log_probabilities = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        score = sum(log_probabilities[i - 1, labels[i]] for i in range(1, len(ids)) if labels[i] != -100)
        (scale * score).backward()
        for name in names:
            total[name] += model.get_parameter(name).grad ** 2 / len(pairs)
    return {b: sum(v.norm().item() for n, v in total.items() if f".layers.{b}." in n) for b in range(4)}


def ours(model, pairs):
    blocks = [(b, [n for n, _ in model.named_parameters() if f".layers.{b}." in n]) for b in range(4)]
    names = [name for _, inside in blocks for name in inside]
    return block_norms(fisher_diagonal(model, pairs, names), blocks)


def test_scores_equal_brute_force_per_example_gradients():
    model = tiny("llama")
    expected, found = brute_force(model, examples()), ours(model, examples())
    assert found == pytest.approx(expected, rel=1e-3)
    batch_gradient_squared = brute_force(model, [tuple(torch.cat(side) for side in zip(*examples()))])
    assert found != pytest.approx(batch_gradient_squared, rel=1e-2)


def test_duplicating_examples_changes_nothing():
    model = tiny("llama")
    assert ours(model, examples() * 2) == pytest.approx(ours(model, examples()), rel=1e-4)


def test_scaling_the_loss_scales_scores_by_its_square():
    model = tiny("llama")
    plain, scaled = ours(model, examples()), brute_force(model, examples(), scale=3.0)
    assert scaled == pytest.approx({block: 9 * score for block, score in plain.items()}, rel=1e-3)
    assert sorted(plain, key=plain.get) == sorted(scaled, key=scaled.get)


def test_gradients_and_flags_are_left_as_they_were():
    model = tiny("llama").requires_grad_(False)
    ours(model, examples())
    assert not any(value.requires_grad for value in model.parameters())
    assert all(value.grad is None for value in model.parameters())


def test_labels_are_drawn_where_records_attend_by_themselves_too():
    found = []
    for attention in ("sdpa", "eager"):
        model = tiny("llama")
        model.config._attn_implementation = attention
        rows = [{"input_ids": ids, "labels": labels, "position_ids": torch.arange(len(ids))} for ids, labels in examples()]
        with attend_by_record(model, rows) as by_record:
            assert by_record == (attention == "sdpa")
        names = [name for name, _ in model.named_parameters() if ".layers." in name]
        draw = torch.Generator().manual_seed(0)
        found.append(fisher_diagonal(model, examples(), names, labels="sampled", generator=draw))
        assert not torch.allclose(found[-1][names[0]], fisher_diagonal(model, examples(), names)[names[0]], rtol=1e-2)
    assert all(torch.allclose(value, found[1][name], rtol=1e-3, atol=1e-6) for name, value in found[0].items())


def test_every_block_and_the_embeddings_is_full_fine_tuning(llama_folder):
    results = []
    for chosen in ("every block", "all"):
        base = load_base(llama_folder)
        if chosen == "all":
            selection = Selection.all(base.model)
        else:
            method = catalogue.create("parameters", "fisher_blocks:k=4,examples=2")
            record = Record("chat", (Message("user", "Which lamp?"), Message("assistant", "Red.")))
            context = Context(base, Encoder(base.tokenizer, 64), [record], [], torch.Generator(), Meter("choose"))
            rest = [*base.anatomy.embeddings, *base.anatomy.norms]
            selection = method.select(context) | Selection.of(base.model, rest)
        model = Full().apply(base, selection, 0)
        train_a_little(model, base)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
