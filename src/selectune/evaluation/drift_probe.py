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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from selectune.errors import UserError
from selectune.models.head import SplitModel
from selectune.progress import watched

if TYPE_CHECKING:
    from selectune.run import Run


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


@dataclass(frozen=True)
class Drift:
    """What base and specialist give to the domain's tokens, prompt by prompt."""

    words: list[str]
    """The tokens, those that the domain uses most first."""
    base: list[Mass]
    specialist: list[Mass]

    def interval(self, what: Literal["total", "largest"], confidence: float = 0.95) -> tuple[float, float]:
        """Return a bootstrap interval, over prompts, of the mean difference."""
        from selectune.evaluation.statistics import paired_bootstrap

        before, after = (np.array([getattr(one, what) for one in masses]) for masses in (self.base, self.specialist))
        return paired_bootstrap(before, after, confidence)


def drift_of(run: Run, prompts: int = 40, steps: int = 64, threshold: float = 2.0, quiet: bool = True) -> Drift:
    """Measure a run's specialist against its base, on the built-in general prompts and the tokens typical of its training responses.

    Args:
        prompts: how many. steps: tokens of an answer at most. threshold: log-odds, in nats, of the domain's tokens against general text.

    Raises:
        UserError: the run has no specialist yet, its base is not there, or no token is the domain's.
    """
    from selectune.adapters import side_by_side
    from selectune.data import Encoder, Message
    from selectune.data.records import records_from_file
    from selectune.evaluation.probe import general_conversations, load_general_prompts, load_general_text

    recipe = run.recipe
    base, specialist = side_by_side(run)
    encoder, words = Encoder(base.tokenizer, recipe.data.max_length, system=recipe.data.system), base.tokenizer

    def responses(records: Any) -> list[list[int]]:
        return [[token for token in piece.labels if token >= 0] for one in records for piece in encoder.encode(one)]

    domain = responses(records_from_file(run.records("train")))
    general = responses(general_conversations()) + [words(passage.text)["input_ids"] for passage in load_general_text()]
    counts = Counter(token for text in domain for token in text)
    typical = typical_tokens(domain, general, threshold) - set(words.all_special_ids)  # short answers end often
    tokens = sorted(typical, key=lambda token: (-counts[token], token))
    if not tokens:
        raise UserError(f"no token of the training responses has log-odds above {threshold:g} against general text", field="threshold",
                        expected="a lower one")  # fmt: skip
    asked = [encoder.prompt_ids((Message("user", one.prompt),)) for one in load_general_prompts()[:prompts]]
    masses: dict[str, list[Mass]] = {"base": [], "specialist": []}
    for prompt in watched(asked, "Answering general prompts", quiet):
        for name, model in (("base", base.model), ("specialist", specialist)):
            masses[name].append(mass_on(model, [prompt], tokens, words.eos_token_id, steps))
    return Drift([words.decode([token]) for token in tokens], masses["base"], masses["specialist"])
