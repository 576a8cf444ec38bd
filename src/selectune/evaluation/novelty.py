"""What did a specialist learn that its base does not say? Texts that it finds likely and the base does not, written by the two together.

Knows: the contrast of two models' next words among those that the specialist finds plausible, how a text is drawn by it, and how the base is
brought nearer to each text so that the next shows something else ("What's New in My Data? Novelty Exploration via Contrastive Generation", ICLR
2025, arXiv 2410.14765); how the two models of a run are loaded. Does not know: how a text is shown.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selectune.errors import UserError
from selectune.models.anatomy import context_length, end_tokens

if TYPE_CHECKING:
    from selectune.run import Run


@dataclass(frozen=True)
class Novelty:
    """How texts are looked for; the paper's settings, with shorter texts and fewer rounds for small models."""

    rounds: int = 20
    """Texts."""
    tokens: int = 64
    """Of each text; its end is not asked for, so that texts are of one length and their sums can be compared."""
    plausible: float = 0.1
    """Words below this share of the specialist's likeliest probability are never taken (alpha)."""
    contrast: float = 1.0
    """How much the base's log-probability counts against a word (gamma); 0: the specialist alone (with one beam, plain draws)."""
    beams: int = 4
    """Texts that are drawn side by side, of which the best is kept; 1: every word is a plain draw from the scores."""
    iterative: bool = True
    """Train the base on each text before the next one is looked for."""
    learning_rate: float = 5e-5
    """Of that one step."""


@dataclass(frozen=True)
class Found:
    """A text, and what both models make of it."""

    text: str
    specialist: float
    """Mean log-probability of its tokens, nats."""
    base: float
    """The same by the base as it was in the beginning."""

    @property
    def contrast(self) -> float:
        """How much likelier the specialist finds it, in nats per token."""
        return self.specialist - self.base


def contrasted(specialist: Tensor, base: Tensor, plausible: float, contrast: float) -> Tensor:
    """Return the score of every next word: ``log p1 - contrast * log p0``, minus infinity where the word is not plausible.

    Args:
        specialist, base: logits ``(..., vocabulary)``. plausible: share of the specialist's largest probability below which a word is not.
    """
    ours, theirs = specialist.float().log_softmax(-1), base.float().log_softmax(-1)
    least = ours.max(-1, keepdim=True).values + (math.log(plausible) if plausible > 0 else -math.inf)
    return (ours - contrast * theirs).masked_fill((ours < least) | ours.isneginf(), -math.inf)


@torch.no_grad()
def draw(
    specialist: Any, base: Any, opening: Sequence[int], how: Novelty, ends: Sequence[int], generator: torch.Generator
) -> list[int]:
    """Return the tokens of one text after an opening: beams that are continued by draws from their summed scores, the best at the end.

    Args:
        opening: at least one token. ends: tokens that are never taken.
    """
    beams, device = how.beams, next(specialist.parameters()).device
    ids, never = torch.tensor([list(opening)] * beams, device=device), torch.tensor(list(ends), dtype=torch.int64, device=device)
    totals = torch.full((beams,), -math.inf)
    totals[0] = 0.0  # all beams are alike before the first word
    memories: list[Any] = [None, None]
    written = torch.empty(beams, 0, dtype=torch.int64)
    for _ in range(how.tokens):
        logits = []
        for number, model in enumerate((specialist, base)):
            said = model(input_ids=ids, past_key_values=memories[number], use_cache=True)
            memories[number] = said.past_key_values
            logits.append(said.logits[:, -1].index_fill(-1, never, -math.inf))
        scores = contrasted(logits[0], logits[1], how.plausible, how.contrast).cpu()
        summed = (totals[:, None] + scores).flatten()
        taken = _drawn(summed, beams, generator)
        owners, words = taken // scores.shape[1], taken % scores.shape[1]
        totals, written = summed[taken], torch.cat([written[owners], words[:, None]], 1)
        owners, ids = owners.to(device), words[:, None].to(device)
        for memory in memories:
            memory.reorder_cache(owners)
    return [int(word) for word in written[int(totals.argmax())]]


def _drawn(summed: Tensor, beams: int, generator: torch.Generator) -> Tensor:
    """Return the places of the next beams: twice as many are drawn without replacement, and of them the best are kept; a single beam is one draw.
    Where fewer are possible, the last one is repeated."""
    possible = int(summed.isfinite().sum())
    probabilities = (summed - summed.max()).double().exp()
    drawable = int((probabilities > 0).sum())
    drawn = torch.multinomial(probabilities, min(2 * beams if beams > 1 else 1, drawable, possible), generator=generator)
    best = drawn[summed[drawn].argsort(descending=True, stable=True)][:beams]
    return torch.cat([best, best[-1:].expand(beams - len(best))])


def novelties(
    specialist: Any, base: Any, tokenizer: Any, how: Novelty | None = None, *, opening: Sequence[int] | None = None, seed: int = 0
) -> Iterator[Found]:
    """Yield texts that show what a specialist learnt beyond its base. Neither model is changed.

    Args:
        specialist, base: models of one vocabulary, in fp32 (rounding would be taken for novelty). opening: what texts begin after;
            left out: the token that begins every text.

    Raises:
        UserError: texts are longer than the context.
    """
    how = how or Novelty()
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    begun = list(opening or [first])
    room = context_length(specialist) - len(begun)
    if how.tokens > room:
        raise UserError(
            f"texts of {how.tokens:,} tokens do not fit the model's context", field="--tokens", expected=f"at most {room:,}"
        )
    generator = torch.Generator().manual_seed(seed)
    ends = sorted({*end_tokens(specialist, tokenizer), tokenizer.pad_token_id} - {None})
    known = copy.deepcopy(base).float() if how.iterative else base  # what was shown already is taught to it
    stepper = torch.optim.AdamW(known.requires_grad_(True).parameters(), lr=how.learning_rate) if how.iterative else None
    for _ in range(how.rounds):
        written = draw(specialist, known, begun, how, ends, generator)
        if stepper is not None:
            (-log_probability(known, begun, written).mean()).backward()
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        with torch.no_grad():
            means = [float(log_probability(model, begun, written).mean()) for model in (specialist, base)]
        yield Found(tokenizer.decode(written, skip_special_tokens=True), *means)


def novelties_of(run: Run, how: Novelty | None = None, *, ask: str | None = None, seed: int = 0) -> Iterator[Found]:
    """Yield texts that show what a run's specialist learnt.

    Args:
        ask: a question that texts are answers to.

    Raises:
        UserError: the run has no specialist yet, or its base is not there.
    """
    from selectune.adapters import side_by_side
    from selectune.data.chat import Encoder
    from selectune.data.records import Message

    recipe = run.recipe
    base, specialist = side_by_side(run, torch.float32)
    encoder = Encoder(base.tokenizer, recipe.data.max_length, system=recipe.data.system)
    opening = None if ask is None else encoder.prompt_ids((Message("user", ask),))
    yield from novelties(specialist, base.model, base.tokenizer, how, opening=opening, seed=seed)


def log_probability(model: Any, opening: Sequence[int], written: Sequence[int]) -> Tensor:
    """Return the log-probability of each token after an opening, ``(tokens,)`` fp32."""
    ids = torch.tensor([[*opening, *written]], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(opening) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(opening) :, None])[:, 0]
