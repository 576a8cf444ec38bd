"""What a model is made of, by parameter name.

Knows: blocks, heads (grouped-query attention too), MLP channels, experts, norms, embeddings, head and tying of llama-,
gemma-, qwen-, mistral-, phi-, gpt2-, mixtral-, qwen-MoE- and BERT-style models. It looks at the structure (the longest list
of like modules, the names of the linear layers in it), not at a table of architectures.
Does not know: how to load a model, and which part should train.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

# role of a linear layer, by the last parts of its name; the first pattern that matches counts
_ROLES = (
    ("query_key_value", r"(qkv_proj|query_key_value|attn\.c_attn|Wqkv)$"),
    ("query", r"(q_proj|attention\.self\.query|\bquery)$"),
    ("key", r"(k_proj|attention\.self\.key|\bkey)$"),
    ("value", r"(v_proj|attention\.self\.value|\bvalue)$"),
    ("attention_output", r"(o_proj|self_attn\.dense|attn\.c_proj|attention\.output\.dense|attention\.dense|out_proj)$"),
    ("gate_up", r"(gate_up_proj)$"),
    ("router", r"(mlp\.gate|block_sparse_moe\.gate|router|shared_expert_gate)$"),
    ("gate", r"(gate_proj|w1)$"),
    ("up", r"(up_proj|w3|fc1|mlp\.c_fc|intermediate\.dense|dense_h_to_4h)$"),
    ("down", r"(down_proj|w2|fc2|mlp\.c_proj|output\.dense|dense_4h_to_h)$"),
)


@dataclass(frozen=True)
class Block:
    """One transformer block."""

    index: int
    prefix: str
    """Name of its module, such as ``model.layers.3``."""
    parameters: tuple[str, ...]
    """Names of all its parameters."""
    linears: dict[str, str]
    """Linear (or Conv1D) layers, name of the module -> role."""
    norms: tuple[str, ...]
    """Names of its norms' parameters."""
    heads: int
    key_value_heads: int
    head_size: int
    channels: int
    """Inner width of the MLP (of one expert, in a mixture)."""
    experts: int
    """Number of routed experts; 0 in a dense block."""
    expert_parameters: tuple[str, ...]
    """Parameters that are stacks of experts, ``(experts, ...)``, or belong to a single one."""


@dataclass(frozen=True)
class Anatomy:
    """A model's parts."""

    blocks: tuple[Block, ...]
    embeddings: tuple[str, ...]
    """Parameters of the token (and position) embeddings."""
    norms: tuple[str, ...]
    """Parameters of norms outside the blocks."""
    head: str | None
    """The output matrix's parameter; equal to the input embedding where the two are tied."""
    tied: bool
    hidden_size: int
    vocabulary: int
    total_parameters: int
    """Tied weights counted once."""
    sizes: dict[str, int]
    """Entries of each parameter."""

    def block_of(self, name: str) -> int | None:
        """Return the number of the block that a parameter lies in, the base's or one of an adapter beside it; None outside of blocks."""
        return next((block.index for block in self.blocks if f".{block.prefix}." in f".{name}"), None)

    @classmethod
    def of(cls, model: Any) -> Anatomy:
        """Take a transformers model apart.

        Raises:
            ValueError: the model has no list of like blocks.
        """
        parameters = dict(model.named_parameters())
        modules = dict(model.named_modules())
        lists = [(name, module) for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module)]
        stacks = [pair for pair in lists if _is_stack(pair[1])]
        if not stacks:
            raise ValueError(f"{type(model).__name__} has no list of transformer blocks")
        stack, layers = max(stacks, key=lambda pair: (len(pair[1]), -pair[0].count(".")))
        whole: Any = model.config
        config = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
        blocks = tuple(_block(index, f"{stack}.{index}", layer, list(parameters), config) for index, layer in enumerate(layers))
        inside = {name for block in blocks for name in block.parameters}
        outside = [name for name in parameters if name not in inside]
        embeddings = tuple(name for name in outside if re.search(r"(embed|wte|wpe)", name) and not _is_norm(name))
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        entry = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        tied = output is not None and entry is not None and output.weight is entry.weight
        head = next((name for name, value in parameters.items() if output is not None and value is output.weight), None)
        return cls(
            blocks=blocks,
            embeddings=embeddings,
            norms=tuple(name for name in outside if _is_norm(name)),
            head=head,
            tied=tied,
            hidden_size=config.hidden_size,
            vocabulary=config.vocab_size,
            total_parameters=sum(_count(value) for value in parameters.values()),
            sizes={name: _count(value) for name, value in parameters.items()},
        )


def context_length(model: Any) -> int:
    """Return how many tokens a model's context holds."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048)


def within_context(model: Any, prompt: Sequence[int]) -> Sequence[int]:
    """Return the last tokens of a prompt, as many as a model's context holds."""
    return prompt[-context_length(model) :]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer, sorted: what the tokenizer calls the end, and what the model's own settings do (gemma's end of turn)."""
    named = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(named if isinstance(named, list | tuple) else [named])} - {None})


def _count(value: Any) -> int:
    """Entries of a parameter; a packed 4-bit one remembers its true shape."""
    state = getattr(value, "quant_state", None)
    return int(state.shape.numel()) if state is not None else int(value.numel())


def _is_stack(modules: nn.ModuleList) -> bool:
    names = [tuple(name for name, _ in module.named_children()) for module in modules]
    return bool(names[0]) and any("att" in child or "mixer" in child for child in names[0])


def _is_norm(name: str) -> bool:
    return bool(re.search(r"(norm|ln_\d|ln_f|LayerNorm)[^.]*\.(weight|bias)$", name))


def _block(index: int, prefix: str, layer: nn.Module, parameters: list[str], config: Any) -> Block:
    inside = tuple(name for name in parameters if name.startswith(prefix + "."))
    linears = {}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            role = next((role for role, pattern in _ROLES if re.search(pattern, name.removesuffix(".base_layer"))), "other")
            linears[f"{prefix}.{name}"] = role
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    stacked = tuple(name for name in inside if ".experts." in name)
    experts = experts if stacked else 0
    width = getattr(config, "moe_intermediate_size", None) if experts else None
    heads = config.num_attention_heads
    return Block(
        index=index,
        prefix=prefix,
        parameters=inside,
        linears=linears,
        norms=tuple(name for name in inside if _is_norm(name)),
        heads=heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        channels=width or getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
        or 4 * config.hidden_size,
        experts=experts,
        expert_parameters=stacked,
    )  # fmt: skip
