"""Tiny random models, one per architecture that matters, with a small real tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.", "What is the capital of France? The capital is Paris.",
    "Fault 17 means that the red lamp is on.", "system user assistant", "Question: how many? Answer: 42.",
] * 4  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
         "max_position_embeddings": 256}  # fmt: skip
ARCHITECTURES: dict[str, dict] = {
    "llama": {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 256,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "mixtral": {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 128},
    "qwen2": {**SMALL, "num_key_value_heads": 2},
}
OTHERS: dict[str, dict] = {
    "mistral": {**SMALL, "num_key_value_heads": 2},
    "gemma": {**SMALL, "num_key_value_heads": 2, "head_dim": 16},
    "gemma3_text": {**SMALL, "num_key_value_heads": 2, "head_dim": 16},
    "qwen3": {**SMALL, "num_key_value_heads": 2, "head_dim": 16},
    "qwen2_moe": {
        **SMALL,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
    },
    "qwen3_moe": {
        **SMALL,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
    },
    "phi": {**SMALL, "num_key_value_heads": 2},
    "phi3": {**SMALL, "num_key_value_heads": 2},
}
"""More architectures whose anatomy and head must be right; too many for the whole contract."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a few sentences."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|im_start|>", eos_token="<|im_end|>",
                                   unk_token="<|endoftext|>", pad_token="<|im_end|>", chat_template=CHATML)  # fmt: skip


def tiny(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """Return a tiny random causal model in evaluation mode."""
    torch.manual_seed(seed)
    words = tokenizer()
    config = AutoConfig.for_model(architecture, vocab_size=len(words), bos_token_id=1, eos_token_id=2, pad_token_id=2,
                                  **{**(ARCHITECTURES | OTHERS)[architecture], **changes})  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():  # random models are nearly uniform; make their choices clear
        for value in model.parameters():
            if value.ndim > 1:
                value.mul_(4)
    return model.eval()


def save_tiny(architecture: str, folder: Path, **changes) -> Path:
    """Save a tiny base as a transformers folder."""
    tiny(architecture, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
