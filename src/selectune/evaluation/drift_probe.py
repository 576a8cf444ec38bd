"""How far has a specialist's output drifted towards the words of its domain, on prompts that have nothing to do with it?

Knows: which tokens are typical of a domain (their log-odds against general text), and how much probability a model gives them while it
answers greedily. Does not know: which drift is too much.

Source: the output-distribution probe of *How to Teach Large Multimodal Models New Skills*, 2025, arXiv 2510.08564, where the tokens are the
digits and number words of a counting task; here any set of tokens, by default those that the domain's responses favour.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from selectune.models.head import SplitModel


@dataclass(frozen=True)
class Mass:
    """Probability on a set of tokens, averaged over the steps of an answer and then over answers."""

    total: float
    """Of the whole set."""
    largest: float
    """Of its likeliest token."""

    def __sub__(self, other: Mass) -> Mass:
        """The drift from another model."""
        return Mass(self.total - other.total, self.largest - other.largest)


def typical_tokens(domain: Iterable[Sequence[int]], general: Iterable[Sequence[int]], threshold: float = 2.0) -> set[int]:
    """Return the tokens of some texts whose log-odds against others exceed a threshold, in nats.

    Each count is one half more than it is, so that a token that one side never uses has finite log-odds.
    """
    ours, theirs = (Counter(token for text in texts for token in text) for texts in (domain, general))
    sums = [counts.total() + 0.5 * len(ours.keys() | theirs.keys()) for counts in (ours, theirs)]

    def log_odds(counts: Counter[int], total: float, token: int) -> float:
        share = torch.tensor((counts[token] + 0.5) / total, dtype=torch.float64)
        return float(share.logit())

    return {token for token in ours if log_odds(ours, sums[0], token) - log_odds(theirs, sums[1], token) > threshold}


@torch.no_grad()
def mass_on(
    model: Any, prompts: Sequence[Sequence[int]], tokens: Iterable[int], end: int | None = None, steps: int = 256
) -> Mass:
    """Return how much probability a model gives to some tokens while it answers prompts greedily.

    Args:
        model: a causal model or a PEFT model around one. prompts: token ids, with the generation prompt. end: the token that ends an
            answer; its own step counts. steps: tokens of an answer at most.

    Raises:
        ValueError: no prompt, no step or no token.
    """
    split = SplitModel(model)
    device = next(split.causal.parameters()).device
    wanted = torch.tensor(sorted(set(tokens)), device=device)
    if not len(prompts) or not len(wanted) or steps < 1:
        raise ValueError("the probe needs prompts, steps and tokens")
    totals, largest = [], []
    for prompt in prompts:
        cache, new = None, torch.tensor([list(prompt)], device=device)
        sums, peaks = [], []
        for _ in range(steps):
            out = split.decoder(input_ids=new, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            probabilities = split.logits(out.last_hidden_state[0, -1]).float().softmax(-1)
            sums.append(float(probabilities[wanted].double().sum()))
            peaks.append(float(probabilities[wanted].max()))
            new = probabilities.argmax().view(1, 1)
            if int(new) == end:
                break
        totals.append(sum(sums) / len(sums))
        largest.append(sum(peaks) / len(peaks))
    return Mass(sum(totals) / len(totals), sum(largest) / len(largest))
