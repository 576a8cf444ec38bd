"""Choosing records while training: the faithful-if lines of the card, against logits, singular values and Fourier transforms in full."""

import math

import pytest
import torch

from selectune.data import Encoder, Message, Record, pack
from selectune.data.packing import record_spans, repacked
from selectune.training.policies.uds import Directions, Head, combined
from tests.tiny import tiny, tokenizer
from tests.training.policies.running import RECORDS, blocks, run
from tests.training.policies.staged import make, stage


def packed(records=RECORDS[:10], width=128, rows=2):
    encoder = Encoder(tokenizer(), width)
    made = pack([piece for record in records for piece in encoder.encode(record)], width)[:rows]
    return {key: torch.stack([row[key] for row in made]) for key in made[0]}


def alone(batch, span):
    """One record of a batch as a batch."""
    a, b = span
    return {key: batch[key].reshape(-1)[a:b][None] for key in ("input_ids", "labels", "position_ids")}


def ready(policy, model=None, rows=None):
    one = stage(model)
    batch = packed()
    one.rows = [{key: value[number] for key, value in batch.items()} for number in range(len(batch["labels"]))]
    policy.begin(one)
    return one, batch


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "phi"])
def test_norm_and_projection_are_those_of_the_logits(architecture):
    model = tiny(architecture)
    with torch.no_grad():
        for value in model.parameters():  # biases and norms that do something
            if value.dim() == 1:
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    policy = make("uds:positions=4,words=6")
    one, batch = ready(policy, model)
    head = Head.of(one.whole.split, one.passing["of words"])
    span = record_spans(batch["position_ids"], batch["labels"])[1]
    with torch.no_grad():
        states = one.whole.split.hidden(input_ids=batch["input_ids"].reshape(-1)[slice(*span)][None])[0]
        logits = model(batch["input_ids"].reshape(-1)[slice(*span)][None]).logits[0].double()
    norm, sketch = policy.look(head, one.passing["of positions"], states)
    assert float(norm) == pytest.approx(float(torch.linalg.svdvals(logits).sum()), rel=1e-3)
    words, places = one.passing["of words"], one.passing["of positions"]
    vocabulary, longest = logits.shape[1], len(places.signs)
    padded = torch.zeros(longest, vocabulary, dtype=torch.float64)
    padded[: len(logits)] = logits
    right = torch.fft.fft(padded * words.signs).real[:, words.frequencies] * math.sqrt(vocabulary / 6)
    left = torch.fft.fft(right * places.signs[:, None], dim=0).real[places.frequencies] * math.sqrt(longest / 4)
    expected = left / (math.sqrt(vocabulary * longest) / 2)
    assert torch.allclose(sketch.view(4, 6), expected, atol=1e-4 * float(expected.abs().max()))
    per_token, _ = make("uds:per_token=true").look(head, places, states)
    assert float(per_token) == pytest.approx(float(norm) / len(states))


def test_the_projection_keeps_norms_on_average():
    source = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 300, generator=source, dtype=torch.float64)
    found = []
    for _ in range(400):
        left = Directions.drawn(40, 8, source).weights(torch.arange(40))
        right = Directions.drawn(300, 16, source).weights(torch.arange(300))
        found.append(float((left.T @ matrix @ right).square().sum() / matrix.square().sum()))
    # the cosine of dimension 0, and of the middle one, is always 1 or -1
    assert sum(found) / len(found) == pytest.approx((1 + 2 / 40) * (1 + 2 / 300), abs=0.05)


def utilities(model, batch):
    with torch.no_grad():
        return [
            float(torch.linalg.svdvals(model(alone(batch, span)["input_ids"]).logits[0].double()).sum())
            for span in record_spans(batch["position_ids"], batch["labels"])
        ]


def test_without_diversity_the_largest_nuclear_norms_are_kept():
    policy = make("uds:diversity=0")
    one, batch = ready(policy)
    spans = record_spans(batch["position_ids"], batch["labels"])
    assert len(spans) >= 4
    one.tensors["remembered"] = torch.randn(5, 8 * 128)
    for count in (1, 2, len(spans) - 1):
        expected = sorted(sorted(range(len(spans)), key=lambda i: -utilities(one.whole.causal, batch)[i])[:count])
        assert policy.choose(one, batch, spans, count) == expected
    assert one.whole.training and one.whole.causal.training


def test_a_copy_of_what_is_remembered_is_less_novel():
    policy = make("uds:diversity=1e9")
    one, _ = ready(policy)
    several = [RECORDS[0], RECORDS[0], Record("chat", (Message("user", "Name a colour."), Message("assistant", "Green.")))]
    batch = packed(several, rows=3)
    spans = record_spans(batch["position_ids"], batch["labels"])
    texts = [batch["input_ids"].reshape(-1)[slice(*span)].tolist() for span in spans]
    (other,) = [number for number, text in enumerate(texts) if texts.count(text) == 1]
    copy = (other + 1) % 3
    one.passing["chosen"] = []
    policy.choose(one, alone(batch, spans[copy]), [(0, spans[copy][1] - spans[copy][0])], 1)
    policy.gradients(one)
    assert one.tensors["remembered"].shape == (1, 8 * 128) and one.passing["chosen"] == []
    assert policy.choose(one, batch, spans, 1) == [other]


def test_both_terms_vary_alike_unless_a_weight_is_given():
    utility, novelty = torch.tensor([1.0, 5.0, 3.0]).double(), torch.tensor([0.3, 0.1, 0.2]).double()
    even = combined(utility, novelty, None) - utility
    assert float(even.std()) == pytest.approx(float(utility.std()))
    assert combined(utility, novelty, 2.0).tolist() == pytest.approx([1.6, 5.2, 3.4])
    assert combined(utility, torch.zeros(3), None).tolist() == utility.tolist()


def test_the_memory_forgets_the_oldest():
    policy, one = make("uds:memory=3"), stage()
    for number in range(3):
        one.passing["chosen"] = [torch.full((2, 4), float(number))]
        policy.gradients(one)
    assert one.tensors["remembered"][:, 0].tolist() == [1, 2, 2]


def test_the_loss_is_that_of_the_kept_records_and_no_other_is_passed_back():
    policy = make("uds:keep=0.3")
    one, batch = ready(policy)
    spans = record_spans(batch["position_ids"], batch["labels"])
    one.tokens = 77  # of the whole batch, of which this is a micro-batch
    seen = []

    def plain(other=batch):
        seen.append(other)
        return one.whole(**other) / one.tokens

    found = policy.loss(one, batch, plain)
    found.backward()
    gradient = {name: value.grad.clone() for name, value in one.parameters.items()}
    one.clear()
    count = max(1, round(0.3 * len(spans)))
    norms = utilities(one.whole.causal, batch)  # nothing is remembered yet
    kept = [spans[i] for i in sorted(sorted(range(len(spans)), key=lambda i: -norms[i])[:count])]
    singles = [alone(batch, span) for span in kept]
    tokens = sum(int((single["labels"][:, 1:] != -100).sum()) for single in singles)
    share = int((batch["labels"][:, 1:] != -100).sum()) / 77
    expected = sum(one.whole(**single) for single in singles) / tokens * share
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for name, value in one.parameters.items():
        assert torch.allclose(gradient[name], value.grad, atol=1e-5), name
    assert len(seen) == 1 and seen[0]["input_ids"].numel() <= -(-sum(b - a for a, b in kept) // 32) * 32
    assert one.numbers == {"met": len(spans), "learnt": count}


def test_what_is_packed_anew_is_the_same_records_in_fewer_tokens():
    batch = packed(RECORDS[:12], rows=3)
    spans = record_spans(batch["position_ids"], batch["labels"])

    def texts(some):
        return sorted(
            (some["input_ids"].reshape(-1)[a:b].tolist(), some["labels"].reshape(-1)[a:b].tolist())
            for a, b in record_spans(some["position_ids"], some["labels"])
        )

    for count in (1, 2, 3, len(spans)):
        made = repacked(batch, spans[:count])
        assert texts(made) == sorted(texts(alone(batch, span))[0] for span in spans[:count])
        assert made["input_ids"].shape[1] <= 128 and made["input_ids"].shape[1] % 32 == 0
    single = repacked(batch, spans[:3], alone=True)
    assert len(single["input_ids"]) == 3 and single["input_ids"].shape[1] == max(b - a for a, b in spans[:3])


def test_a_run_saves_backward_passes(tmp_path, llama_folder):
    counts = {}
    for name, policy in (("plain", "none"), ("uds", "uds:keep=0.25"), ("late", "uds:keep=0.25,start=3")):
        ran = run(tmp_path / name, llama_folder, policy, choose=blocks, evaluations=0, micro_batch_sequences=4)
        counts[name] = ran.cost.backward_tokens
    assert counts["uds"] <= 0.5 * counts["plain"]
    assert counts["uds"] < counts["late"] < counts["plain"]


def test_nothing_but_padding_and_single_records_are_learnt_from_as_ever():
    policy = make("uds")
    one, batch = ready(policy)
    span = record_spans(batch["position_ids"], batch["labels"])[0]
    for some in (alone(batch, span), {**batch, "labels": torch.full_like(batch["labels"], -100)}):
        assert policy.loss(one, some, lambda: torch.tensor(3.0)) == 3.0
