"""Writes a GGUF file: transformers' tensor names and settings in llama.cpp's terms.

Knows: llama-style models (Llama, Mistral, SmolLM) and Qwen2/Qwen3 with a byte-level BPE tokenizer; the name map comes from the
``gguf`` package. Does not know: quantised GGUF types; llama.cpp's own tools make those from this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selectune.errors import UserError

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
PRE_TOKENIZERS = {"llama": "smollm", "mistral": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}


def write_gguf(model: Any, tokenizer: Any, file: Path, dtype: torch.dtype, name: str) -> None:
    """Write a causal model to a GGUF file, matrices in ``dtype`` and vectors in fp32.

    Raises:
        UserError: the architecture or the tokenizer is not supported.
    """
    import gguf

    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise UserError(f"GGUF export does not know '{config.model_type}' models", field="--gguf",
                        expected=f"one of {', '.join(ARCHITECTURES)}", mend="export a folder instead")  # fmt: skip
    kind = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[kind])
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))))
    writer.add_file_type({torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[dtype])
    _write_tokenizer(writer, tokenizer, config)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    raw = {torch.float32: gguf.GGMLQuantizationType.F32, torch.float16: gguf.GGMLQuantizationType.F16,
           torch.bfloat16: gguf.GGMLQuantizationType.BF16}  # fmt: skip
    tied = config.tie_word_embeddings
    for key, value in model.state_dict().items():
        if tied and key == "lm_head.weight":
            continue
        target = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UserError(f"GGUF has no name for the tensor {key}", field="--gguf", mend="export a folder instead")
        if ARCHITECTURES[config.model_type] == "LLAMA" and key.endswith(("q_proj.weight", "k_proj.weight")):
            value = _permute(value, heads if "q_proj" in key else shared)
        kept = torch.float32 if value.ndim == 1 else dtype
        tensor = value.to("cpu", kept).contiguous()
        if kept == torch.bfloat16:
            data = tensor.view(torch.int16).numpy().view("uint8")
            writer.add_tensor(target, data, raw_dtype=raw[kept])
        else:
            writer.add_tensor(target, tensor.numpy(), raw_dtype=raw[kept])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permute(weight: Tensor, heads: int) -> Tensor:
    """Bring the two halves of each head's rotary pairs side by side, as llama.cpp's llama models have them."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _write_tokenizer(writer: Any, tokenizer: Any, config: Any) -> None:
    import gguf

    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    if settings["model"]["type"] != "BPE":
        raise UserError(f"GGUF export does not know {settings['model']['type']} tokenizers", field="--gguf",
                        expected="a byte-level BPE tokenizer", mend="export a folder instead")  # fmt: skip
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    special = {entry["id"]: entry["special"] for entry in settings["added_tokens"]}
    tokens, kinds = [], []
    for index in range(config.vocab_size):
        tokens.append(words.get(index, f"[PAD{index}]"))
        if index not in words:
            kinds.append(gguf.TokenType.UNUSED)
        elif index in special:
            kinds.append(gguf.TokenType.CONTROL if special[index] else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[config.model_type])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = settings["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for add, value in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if value is not None:
            add(value)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
