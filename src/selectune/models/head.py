"""A causal model in two halves: the decoder, and the head that turns hidden states into logits.

Knows: how to run the decoder without the head, and the head on chosen positions only, so that no logit is computed that
nobody uses; the soft-capping and scaling that some architectures put after the head.
Does not know: what the logits are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class SplitModel:
    """The two halves of a causal model (a PEFT model is looked through; its adapters stay active).

    Args:
        model: a transformers causal language model, or a PEFT model around one.
    """

    def __init__(self, model: Any) -> None:
        causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.causal = causal
        self.decoder: nn.Module = getattr(causal, causal.base_model_prefix)
        config = causal.config.get_text_config()
        self._soft_cap = getattr(config, "final_logit_softcapping", None)
        self._scale = getattr(config, "logit_scale", None) if getattr(config, "model_type", "") == "cohere" else None
        self._divide = getattr(config, "logits_scaling", None)

    def hidden(self, **inputs: Any) -> Tensor:
        """Return the last hidden states, ``(batch, length, hidden)``."""
        inputs.setdefault("use_cache", False)
        return self.decoder(**inputs).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of some hidden states, ``(..., vocabulary)``, in the dtype of the computation."""
        return self.finish(self.causal.get_output_embeddings()(hidden))

    def logits_by_words(self, hidden: Tensor, words: int) -> Iterator[Tensor]:
        """Yield the logits of some hidden states for so many words at a time, ``(..., words)``; for all at once with a head of another kind."""
        head = self.causal.get_output_embeddings()
        if type(head) is not nn.Linear or not head.weight.is_floating_point():
            yield self.logits(hidden)
            return
        for first in range(0, head.out_features, words):
            some = slice(first, first + words)
            yield self.finish(nn.functional.linear(hidden, head.weight[some], None if head.bias is None else head.bias[some]))

    def logits_of(self, hidden: Tensor, tokens: Tensor) -> Tensor | None:
        """Return the logit of one token for each hidden state, ``(positions)`` fp32, unrounded; None with a head of another kind.

        Args:
            hidden: ``(positions, hidden)``. tokens: ``(positions)`` int64.
        """
        head = self.causal.get_output_embeddings()
        if type(head) is not nn.Linear or not head.weight.is_floating_point():
            return None
        logits = (hidden.float() * head.weight[tokens].float()).sum(-1)
        return self.finish(logits if head.bias is None else logits + head.bias[tokens].float())

    def finish(self, logits: Tensor) -> Tensor:
        """Return logits as the softmax meets them, from what the head's matrix gives; each by itself."""
        if self._scale:
            logits = logits * self._scale
        if self._divide:
            logits = logits / self._divide
        if self._soft_cap:
            logits = torch.tanh(logits / self._soft_cap) * self._soft_cap
        return logits

    def head_parameters(self) -> list[Tensor]:
        """Return what trains in the head."""
        return [value for value in self.causal.get_output_embeddings().parameters() if value.requires_grad]

    @torch.no_grad()
    def agrees(self) -> bool:
        """Whether the two halves together give the logits of the model's own forward pass (checked on four tokens)."""
        device = next(self.causal.parameters()).device
        tokens = torch.arange(4, device=device)[None] % self.causal.config.get_text_config().vocab_size
        whole = self.causal(input_ids=tokens, use_cache=False).logits.float()
        return torch.allclose(self.logits(self.hidden(input_ids=tokens)).float(), whole, atol=1e-2, rtol=1e-2)
