"""Up-cycling: a mixture of experts made of a dense base.

Every MLP becomes E copies of itself behind a router. A token's gate weights add up to one, so as long as the copies are equal the mixture computes
what the base computes, whatever the router says; a small seeded noise on the copies and on the router gives training something to tell apart.
Knows: which mixture of transformers has the attention and the norms of which dense architecture. Does not know: what the mixture is for.

Source: the idea of *Sparse Upcycling*, ICLR 2023, arXiv 2212.05055.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from selectune.errors import UserError

if TYPE_CHECKING:
    from selectune.models.load import Base

_MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("mixtral", {}),
    "mistral": ("mixtral", {}),
    "qwen2": (
        "qwen2_moe",
        {"norm_topk_prob": True, "shared_expert_intermediate_size": 1, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "qwen3": ("qwen3_moe", {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}),
}
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
    "initializer_range", "sliding_window", "attention_dropout",
)  # fmt: skip


@torch.no_grad()
def upcycled(model: Any, experts: int = 4, active: int = 2, jitter: float = 0.01, router: float = 0.02, seed: int = 0) -> Any:
    """Return a mixture made of a dense causal model, in its dtype, on its device and in evaluation mode.

    Args:
        experts: copies of each MLP. active: of them, used for a token. jitter: standard deviation of the noise on each copy, relative to that of
            the matrix; at 0 the mixture computes what the model does, up to the rounding of a sum. router: standard deviation of the router's
            weights. seed: of both.

    Raises:
        UserError: no mixture of transformers has this attention, or the numbers make no sense.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = model.config
    if config.model_type not in _MIXTURES or getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise UserError(f"a base of the kind '{config.model_type}' has no mixture with the same attention", field="base",
                        expected=f"{', '.join(_MIXTURES)}, without biases of its own")  # fmt: skip
    if not 1 <= active <= experts:
        raise UserError(f"{active} of {experts} experts cannot be active", field="active", expected=f"1 to {experts}")
    kind, settings = _MIXTURES[config.model_type]
    kept = {key: getattr(config, key) for key in _KEPT if getattr(config, key, None) is not None}
    number = (
        {"num_local_experts": experts}
        if kind == "mixtral"
        else {"num_experts": experts, "moe_intermediate_size": config.intermediate_size}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **kept, **settings, **number, num_experts_per_tok=active), dtype=model.dtype
        ).eval()
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = {name: value.cpu() for name, value in model.named_parameters()}, dict(made.named_parameters())
    for name, value in theirs.items():
        block, _, own = name.partition(".mlp.")
        if not own:
            value.copy_(ours[name])
        elif own == "gate.weight":
            value.copy_(torch.randn(value.shape, generator=generator) * router)
        elif own.startswith("experts."):
            plain = [
                ours[f"{block}.mlp.{part}.weight"] for part in (("gate_proj", "up_proj") if "gate_up" in own else ("down_proj",))
            ]
            whole = torch.cat(plain)
            for expert in range(experts):
                noise = torch.randn(whole.shape, generator=generator) * (jitter * float(whole.float().std())) if jitter else 0.0
                value[expert].copy_(whole.float() + noise)
        else:  # a shared expert, which the dense model has not
            value.zero_()
    return made.to(model.device)


def upcycle(base: Base, folder: str | Path, **settings: Any) -> Path:
    """Write the mixture that :func:`upcycled` makes of a base as a transformers folder, which is a base like any other; return the folder."""
    folder = Path(folder)
    upcycled(base.model, **settings).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder
