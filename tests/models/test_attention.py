"""Attention by record is causal attention of each record alone: forward, backward, every length, shared keys."""

import pytest
import torch
from torch.nn import functional

from selectune.data import pack
from selectune.data.packing import record_spans
from selectune.models import attention
from selectune.models.attention import NAME, attend_by_record
from tests.tiny import ARCHITECTURES, OTHERS, tiny
from tests.training.test_training import encoded


def plain(query, key, value, spans, scale):
    """Each record by torch's own attention; nothing outside the records."""
    groups, shared = query.shape[:2]
    result = query.new_zeros(*query.shape[:3], value.shape[-1])
    for start, end in spans:
        q = query[:, :, start:end].flatten(0, 1)
        k, v = (states[:, start:end].repeat_interleave(shared, 0) for states in (key, value))
        found = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale)[0]
        result[:, :, start:end] = found.view(groups, shared, end - start, -1)
    return result


@pytest.mark.parametrize("kept_length", [512, 0])
@pytest.mark.parametrize("spans", [[(0, 7)], [(0, 1), (1, 130), (130, 133)], [(3, 300)], [(0, 128), (140, 396)]])
def test_forward_and_backward_are_those_of_each_record_alone(spans, kept_length, monkeypatch):
    monkeypatch.setattr(attention, "KEPT_LENGTH", kept_length)
    torch.manual_seed(0)
    tokens = spans[-1][1] + 5
    shapes = [(2, 3, tokens, 8), (2, tokens, 8), (2, tokens, 6)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    ours = attention._ByRecord.apply(*inputs, 0.3, spans)
    theirs = plain(*inputs, spans, 0.3)
    assert torch.allclose(ours, theirs, atol=1e-12)
    wanted = torch.randn_like(ours)
    for one, other in zip(torch.autograd.grad(ours, inputs, wanted), torch.autograd.grad(theirs, inputs, wanted), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_records_are_found_and_padding_is_left_out():
    rows = pack(encoded(5), 64)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    spans = record_spans(batch["position_ids"], batch["labels"])
    positions, labels = batch["position_ids"].reshape(-1), batch["labels"].reshape(-1)
    assert len(spans) == 5
    for start, end in spans:
        assert positions[start:end].tolist() == list(range(end - start)) and (labels[start:end] != -100).any()
    learnt = sum(int((labels[start:end] != -100).sum()) for start, end in spans)
    assert learnt == int((labels != -100).sum())
    assert len(record_spans(batch["position_ids"])) >= 5


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_models_attend_by_record_where_that_is_the_same(architecture):
    model, rows = tiny(architecture), pack(encoded(7), 96)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    config = model.config.get_text_config()
    own = config._attn_implementation
    plain = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    with attend_by_record(model, rows) as works:
        assert works == (architecture != "gemma2")  # it caps its scores
        if works:
            assert config._attn_implementation == NAME
            records = record_spans(batch["position_ids"], batch["labels"])
            ours = model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, records=records
            ).logits
            learnt = batch["labels"] != -100
            assert torch.allclose(ours[learnt], plain[learnt], atol=1e-4, rtol=1e-4)
            with pytest.raises(ValueError, match="records"):
                model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    assert config._attn_implementation == own


def test_not_with_dropout_nor_with_a_window_that_cuts_records():
    rows = pack(encoded(7), 96)
    with attend_by_record(tiny("llama", attention_dropout=0.1), rows) as works:
        assert not works
    with attend_by_record(tiny("gemma3_text", sliding_window=4), rows) as works:
        assert not works
    unlearnt = [row | {"labels": torch.full_like(row["labels"], -100)} for row in rows]  # states are asked for, no loss
    with attend_by_record(tiny("gemma3_text", sliding_window=4), unlearnt) as works:
        assert not works
    with attend_by_record(tiny("llama"), unlearnt) as works:
        assert works


@pytest.mark.parametrize("trained", ["lora", "block", "everything"])
def test_gradients_in_mixed_precision_are_near_those_of_fp32(trained, tmp_path):
    """Frozen weights bf16, trained ones fp32, autocast: the dtypes that meet in attention differ by what trains."""
    from peft import LoraConfig, get_peft_model

    rows = pack(encoded(7), 96)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    found = []
    for mixed in (True, False):
        model = tiny("llama").requires_grad_(False)
        if mixed:
            model.to(torch.bfloat16)
        if trained == "lora":
            torch.manual_seed(1)
            get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
            names = ["self_attn.q_proj.lora_A.default.weight"]
            for name, value in model.named_parameters():
                value.requires_grad_("lora" in name)
                if "lora" in name:
                    value.data = value.data.float()
        else:
            part = model.model.layers[2] if trained == "block" else model
            part.float().requires_grad_(True)
            names = ["self_attn.q_proj.weight"]
        with attend_by_record(model, rows) as works, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            assert works
            records = record_spans(batch["position_ids"], batch["labels"])
            hidden = model.model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, records=records
            ).last_hidden_state
        states = hidden[batch["labels"] != -100].float()
        (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        gradient = next(v.grad for n, v in model.named_parameters() if f"layers.2.{names[0]}" in n)
        found.append(gradient.float())
    assert (found[0] - found[1]).norm() / found[1].norm() < 0.1


@pytest.mark.parametrize("trained", ["embed_tokens", "layers.1.self_attn.q_proj", "norm"])
def test_fp32_copies_of_some_weights_meet_a_bf16_rest(trained):
    model = tiny("llama").to(torch.bfloat16)
    model.model.get_submodule(trained).float()
    with attend_by_record(model, pack(encoded(3), 64), bfloat16=True) as works:
        assert works
