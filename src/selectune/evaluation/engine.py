"""Runs a causal model over batches of questions, in the fastest way that gives what the plain way gives.

Knows: three ways of laying questions out and which of them a model takes (tried on a few tokens); attention without masks, and short
blocks, where questions lie end to end; beginnings that are computed once; the head on chosen positions only, some words at a
time; bf16 with an fp32 residual stream.
Does not know: what the scores decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from selectune.evaluation.rows import (
    Batch,
    Question,
    apart,
    batches,
    by_length,
    by_prefix,
    end_to_end,
    lay_end_to_end,
    lay_side_by_side,
)
from selectune.models.attention_of_choices import KeysAndValues, Row, attending, rounded
from selectune.models.head import SplitModel
from selectune.models.products import fast_fp32_products
from selectune.models.short_blocks import ShortDecoder

T = TypeVar("T")
Reading = Callable[[Tensor, Batch], T]
"""What becomes of the hidden states at the places of a batch."""
END_TO_END, SIDE_BY_SIDE, PLAIN = "end to end", "side by side", "plain"
SHORT, WIDE, OWN = "short", "wide", "own"
"""How a row end to end is computed: in short blocks; by the model's own blocks with an fp32 residual stream; by them as they are."""
LONGEST_ROW = 2048
"""Tokens of a row that holds several continuations under a dense mask."""
HEAD_ROWS = 1024
"""Positions that meet the vocabulary at once."""
WORDS = 4096
"""Words that they meet at once on a CPU: what is made of them stays in the processor's cache."""
MANY_WORDS = 65536
"""Words that they meet at once on an accelerator: few kernels."""


@dataclass
class Predictions:
    """What a batch predicted, one entry per token of its continuations."""

    owners: list[int]
    values: list[float]
    """Log-probabilities of the tokens."""
    margins: list[float]
    """By how much a token leads all other words, in logits; of a greedy one only the sign counts where margins were not asked for."""


class Engine:
    """A model, ready to score.

    Args:
        model: a causal model or a PEFT model around one. fast: compute in bf16. row_tokens: tokens in one forward pass, padding
            included. like: an engine of the same model in another dtype, whose way is taken; otherwise ways are tried.
    """

    def __init__(self, model: Any, fast: bool, row_tokens: int, like: Engine | None = None) -> None:
        self.split, self.fast, self.row_tokens = SplitModel(model), fast, row_tokens
        self.causal = self.split.causal
        self.device = next(model.parameters()).device
        config = self.causal.config.get_text_config()
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        self._window = min([int(window) for window in windows if window] or [1 << 30])
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        self._by_length = any(kind in str(rope) for kind in ("dynamic", "longrope"))  # positions depend on the longest row
        self._by_length |= any(
            getattr(module, "whole_rows", False) for module in self.causal.modules()
        )  # and these on the record
        self.writes_together: bool | None = None
        """Whether answers may be written together; None until it was tried."""
        self._words = WORDS if self.device.type == "cpu" else MANY_WORDS
        self._form = OWN
        self._short: ShortDecoder | None = None
        if like is None:
            self.way = self._best_way()
        else:
            self.way = like.way
            self._take(like._form)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.fast else torch.float32

    # -- ways of laying out --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _best_way(self) -> str:
        """Return the fastest way that gives the hidden states of the plain one on two short questions."""
        if self._by_length:
            return PLAIN
        size = self.causal.config.get_text_config().vocab_size
        tokens = [(7 * i + 3) % size for i in range(40)]
        start, other = tokens[:5], tokens[20:]
        asked = [
            Question([*start, *other[:3]], {0: other[3:4], 1: other[4:7], 2: other[7:9]}),
            Question([*start, *other[5:12]], {3: other[1:5], 4: other[9:11]}),
        ]
        batch = lay_side_by_side(apart(asked))
        expected = self.states(batch, PLAIN)[batch.which]
        tolerance = 3e-2 if self.fast or next(self.causal.parameters()).dtype != torch.float32 else 1e-4
        for way, form in ((END_TO_END, SHORT), (END_TO_END, WIDE), (END_TO_END, OWN), (SIDE_BY_SIDE, OWN)):
            if (way == END_TO_END and self.device.type != "cpu") or (form == WIDE and not self.fast):
                continue
            try:
                self._take(form)
                if way == END_TO_END:
                    (prefix,) = self.keys_and_values([start])
                    batch = lay_end_to_end([Question(q.context, q.continuations, len(start)) for q in asked])
                    found = self.states(batch, way, Row(batch.parts, prefix))[batch.which]
                else:
                    batch = lay_side_by_side(asked)
                    found = self.states(batch, way)[batch.which]
            except (ValueError, TypeError, RuntimeError, AttributeError):  # hands on too little, or mixes dtypes
                continue
            if (found - expected).norm() < tolerance * expected.norm():
                return way
        return PLAIN

    def _take(self, form: str) -> None:
        self._form, self._short = form, ShortDecoder(self.causal, self._dtype) if form == SHORT else None

    def fits(self, tokens: int) -> bool:
        """Whether attention without masks is right for tokens that see so many."""
        return self.way == END_TO_END and tokens <= self._window

    # -- forward passes ------------------------------------------------------------------------------------------------

    def predict(self, questions: Sequence[Question], margins: bool = False) -> list[Callable[[], Predictions]]:
        """Return the forward passes that answer some questions, each a function that returns :class:`Predictions`."""
        return self._passes(questions, partial(self._predictions, margins=margins))

    def states_before(self, questions: Sequence[Question]) -> list[Callable[[], tuple[list[int], Tensor]]]:
        """Return forward passes, each a function that returns ``(owners, states)``: for each token of a continuation its pair and the
        hidden state that predicts it, ``(tokens, hidden)``."""
        return self._passes(
            questions, lambda states, batch: (batch.owners, states[torch.tensor(batch.which, device=states.device)])
        )

    def _passes(self, questions: Sequence[Question], read: Reading[T]) -> list[Callable[[], T]]:
        passes: list[Callable[[], T]] = []
        others = [question for question in questions if not self.fits(question.reach)]
        groups = by_prefix([question for question in questions if self.fits(question.reach)])
        for few in end_to_end(groups, self.row_tokens, lambda group: len(group[0])):
            kept: list[KeysAndValues] = []
            runs = [
                (place, run) for place, (_, members) in enumerate(few) for run in end_to_end(by_length(members), self.row_tokens)
            ]
            for number, (place, run) in enumerate(runs):
                last = number == len(runs) - 1
                passes.append(partial(self._end_to_end, run, [prefix for prefix, _ in few], kept, place, last, read))
        masked = [question for question in others if self.way == SIDE_BY_SIDE and question.reach <= self._window]
        plain = [question for question in others if not (self.way == SIDE_BY_SIDE and question.reach <= self._window)]
        for run in [*self._padded(apart(masked, LONGEST_ROW)), *self._padded(apart(plain))]:
            passes.append(partial(self._side_by_side, run, read))
        return passes

    def _padded(self, questions: list[Question]) -> Iterator[list[Question]]:
        ordered = sorted(questions, key=lambda question: -question.read)
        return batches(ordered, lambda question: question.read, 1 if self._by_length else self.row_tokens)

    def _end_to_end(
        self, run: list[Question], prefixes: list[list[int]], kept: list[KeysAndValues], place: int, last: bool, read: Reading[T]
    ) -> T:
        """Answer a run of questions behind one of some beginnings, which are computed with the first run and forgotten with the last."""
        if not kept:
            kept += self.keys_and_values(prefixes)
        batch = lay_end_to_end(run)
        found = read(self.states(batch, END_TO_END, Row(batch.parts, kept[place])), batch)
        if last:
            kept.clear()
        return found

    def _side_by_side(self, run: list[Question], read: Reading[T]) -> T:
        batch = lay_side_by_side(run)
        return read(self.states(batch, SIDE_BY_SIDE), batch)

    def keys_and_values(self, prefixes: Sequence[list[int]]) -> list[KeysAndValues]:
        """Return the keys and values of some beginnings, by layer; none for an empty one."""
        batch = lay_end_to_end([Question(prefix, {}) for prefix in prefixes if prefix])
        row = Row(batch.parts, keep=True)
        if batch.parts:
            self.states(batch, END_TO_END, row)
        ends = list(accumulate(map(len, prefixes), initial=0))
        return [
            {
                layer: (keys[:, a:b].contiguous(), values[:, a:b].contiguous())
                for layer, (keys, values) in row.kept.items()
                if a < b
            }
            for a, b in pairwise(ends)
        ]

    @torch.no_grad()
    def states(self, batch: Batch, way: str, row: Row | None = None) -> Tensor:
        """Return the hidden states at the places of a batch, ``(places, hidden)``; ``row`` goes with one laid end to end."""
        ids, positions = batch.ids.to(self.device), batch.positions.to(self.device)
        places = torch.tensor(batch.places, device=self.device)
        with fast_fp32_products(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
            if row is None:
                extra = {} if batch.mask is None else {"attention_mask": self._mask(batch.mask)}
                return self.split.hidden(input_ids=ids, position_ids=positions, **extra).flatten(0, 1)[places]
            room = (0, rounded(ids.shape[1]) - ids.shape[1])  # filled up with tokens that nobody reads
            ids, positions = torch.nn.functional.pad(ids, room), torch.nn.functional.pad(positions, room)
            if self._short is not None:
                return self._short(ids, positions, row, places)
            inputs: dict[str, Any] = {"input_ids": ids}
            if self._form == WIDE:  # what is added up over the blocks is fp32, products are bf16
                inputs = {"inputs_embeds": self.causal.get_input_embeddings()(ids).float()}
            with attending(self.causal):
                return self.split.hidden(position_ids=positions, choices=row, **inputs)[0, places]

    def _mask(self, mask: Tensor) -> Any:
        """Give the mask in the form that the decoder takes as it is: ``(batch, 1, query, key)``, for every kind of layer."""
        config = self.causal.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or [])
        four = mask[:, None].to(self.device)
        if config._attn_implementation == "eager":
            four = torch.zeros(four.shape, device=self.device).masked_fill(~four, torch.finfo(torch.float32).min)
        return {kind: four for kind in kinds} if len(kinds) > 1 else four

    @torch.no_grad()
    def log_probabilities(self, states: Tensor) -> Tensor:
        """Return the log-probabilities of all words at some hidden states, ``(places, vocabulary)`` fp32."""
        with fast_fp32_products(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
            return self.split.logits(states.to(self._dtype)).float().log_softmax(-1)

    def _predictions(self, states: Tensor, batch: Batch, margins: bool) -> Predictions:
        values, leads = self._through_head(states, batch, margins)
        return Predictions(batch.owners, values.tolist(), leads.tolist())

    @torch.no_grad()
    def _through_head(self, states: Tensor, batch: Batch, margins: bool) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each target, and by how much it leads."""
        which = torch.tensor(batch.which, device=states.device)
        targets = torch.tensor(batch.targets, device=states.device)
        values = torch.empty(len(which), device=states.device)
        leads = torch.empty_like(values)
        with fast_fp32_products(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
            for start in range(0, len(states), HEAD_ROWS):
                asked = ((which >= start) & (which < start + HEAD_ROWS)).nonzero().squeeze(-1)
                row = which[asked] - start
                some = states[start : start + HEAD_ROWS]
                values[asked], leads[asked] = self._of_words(some, row, targets[asked], margins)
        return values, leads

    def _of_words(self, states: Tensor, row: Tensor, wanted: Tensor, margins: bool) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities and leads of words ``wanted[k]`` at ``states[row[k]]``, some words of the vocabulary at a time."""
        best = torch.full((len(states), 2 if margins else 1), float("-inf"), device=states.device)
        total, chosen = torch.zeros(len(states), device=states.device), torch.empty(len(row), device=states.device)
        first = 0
        for logits in self.split.logits_by_words(states.to(self._dtype), self._words):
            here = ((wanted >= first) & (wanted < first + logits.shape[-1])).nonzero().squeeze(-1)
            chosen[here] = logits[row[here], wanted[here] - first].float()
            first += logits.shape[-1]
            before = best[:, 0]
            best = (
                torch.cat([best, logits.topk(2).values if margins else logits.amax(-1, keepdim=True)], -1)
                .topk(best.shape[-1])
                .values
            )
            shift = best[:, :1]
            total = total * (before - shift[:, 0]).exp_() + logits.sub_(shift.to(logits.dtype)).exp_().sum(
                -1, dtype=torch.float32
            )
        sharp = self.split.logits_of(states[row], wanted) if self.fast else None  # bf16 rounds a logit by up to a sixteenth
        values = (chosen if sharp is None else sharp) - (total.log_() + best[:, 0])[row]
        lead = chosen - best[row, 0]
        greedy = lead == 0  # above zero by definition, where the margin is not asked for
        lead[greedy] = best[row, 0][greedy] - best[row, 1][greedy] if margins else torch.finfo(torch.float32).tiny
        return values, lead
