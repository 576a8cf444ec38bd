"""Runs a causal model over batches of questions, in the fastest way that gives what the plain way gives.

Knows: three ways of laying questions out and which of them a model takes (tried on a few tokens); attention without masks where
questions lie end to end; beginnings that are computed once; the head on chosen positions only; bf16 with an fp32 residual stream.
Does not know: what the scores decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selectune.evaluation.rows import (
    Batch,
    Question,
    apart,
    batches,
    by_prefix,
    end_to_end,
    lay_end_to_end,
    lay_side_by_side,
)
from selectune.models.attention_of_choices import KeysAndValues, Row, attending
from selectune.models.head import SplitModel
from selectune.models.products import fast_fp32_products

END_TO_END, SIDE_BY_SIDE, PLAIN = "end to end", "side by side", "plain"
LONGEST_ROW = 2048
"""Tokens of a row that holds several continuations under a dense mask."""
HEAD_ROWS = 256
"""Positions that meet the vocabulary at once."""


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
            included.
    """

    def __init__(self, model: Any, fast: bool, row_tokens: int) -> None:
        self.split, self.fast, self.row_tokens = SplitModel(model), fast, row_tokens
        self.causal = self.split.causal
        self.device = next(model.parameters()).device
        config = self.causal.config.get_text_config()
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        self._window = min([int(window) for window in windows if window] or [1 << 30])
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        self._by_length = any(kind in str(rope) for kind in ("dynamic", "longrope"))  # positions depend on the longest row
        self._wide = False
        self.writes_together: bool | None = None
        """Whether answers may be written together; None until it was tried."""
        self.way = self._best_way()

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
        for way, wide in ((END_TO_END, True), (END_TO_END, False), (SIDE_BY_SIDE, False)):
            if (way == END_TO_END and self.device.type != "cpu") or (wide and not self.fast):
                continue
            self._wide = wide
            try:
                if way == END_TO_END:
                    prefix = self.keys_and_values(start)
                    batch = lay_end_to_end([Question(q.context, q.continuations, len(start)) for q in asked])
                    found = self.states(batch, way, Row(batch.parts, prefix))[batch.which]
                else:
                    batch = lay_side_by_side(asked)
                    found = self.states(batch, way)[batch.which]
            except (ValueError, TypeError, RuntimeError, AttributeError):  # hands on too little, or mixes dtypes
                continue
            if (found - expected).norm() < tolerance * expected.norm():
                return way
        self._wide = False
        return PLAIN

    def fits(self, tokens: int) -> bool:
        """Whether attention without masks is right for tokens that see so many."""
        return self.way == END_TO_END and tokens <= self._window

    # -- forward passes ------------------------------------------------------------------------------------------------

    def predict(self, questions: Sequence[Question], margins: bool = False) -> list[Any]:
        """Return the forward passes that answer some questions, each a function that returns :class:`Predictions`."""
        passes: list[Any] = []
        others = [question for question in questions if not self.fits(question.reach)]
        for prefix, members in by_prefix([question for question in questions if self.fits(question.reach)]):
            kept: dict[str, KeysAndValues] = {}
            for run in end_to_end(members, self.row_tokens):
                passes.append(lambda run=run, prefix=prefix, kept=kept: self._end_to_end(run, prefix, kept, margins))
        masked = [question for question in others if self.way == SIDE_BY_SIDE and question.reach <= self._window]
        plain = [question for question in others if not (self.way == SIDE_BY_SIDE and question.reach <= self._window)]
        for run in [*self._padded(apart(masked, LONGEST_ROW)), *self._padded(apart(plain))]:
            passes.append(lambda run=run: self._read(lay_side_by_side(run), SIDE_BY_SIDE, {}, margins))
        return passes

    def _padded(self, questions: list[Question]) -> Iterator[list[Question]]:
        ordered = sorted(questions, key=lambda question: -question.read)
        return batches(ordered, lambda question: question.read, 1 if self._by_length else self.row_tokens)

    def _end_to_end(self, run: list[Question], prefix: list[int], kept: dict[str, KeysAndValues], margins: bool) -> Predictions:
        if "" not in kept:  # the beginning is computed with the first batch that needs it
            kept[""] = self.keys_and_values(prefix) if prefix else {}
        return self._read(lay_end_to_end(run), END_TO_END, kept[""], margins)

    def keys_and_values(self, prefix: list[int]) -> KeysAndValues:
        """Return the keys and values of a beginning, by layer."""
        row = Row([[len(prefix)]], keep=True)
        self._hidden(lay_end_to_end([Question(prefix, {})]), END_TO_END, row)
        return row.kept

    @torch.no_grad()
    def _read(self, batch: Batch, way: str, prefix: KeysAndValues, margins: bool) -> Predictions:
        row = Row(batch.parts, prefix) if way == END_TO_END else None
        values, leads = self._through_head(self.states(batch, way, row), batch, margins)
        return Predictions(batch.owners, values.tolist(), leads.tolist())

    def states(self, batch: Batch, way: str, row: Row | None = None) -> Tensor:
        """Return the hidden states at the places of a batch, ``(places, hidden)``; ``row`` goes with one laid end to end."""
        hidden = self._hidden(batch, way, row)
        return hidden.reshape(-1, hidden.shape[-1])[torch.tensor(batch.places, device=hidden.device)]

    @torch.no_grad()
    def _hidden(self, batch: Batch, way: str, row: Row | None) -> Tensor:
        ids = batch.ids.to(self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": batch.positions.to(self.device)}
        if self._wide and way == END_TO_END:  # what is added up over the blocks is fp32, products are bf16
            inputs["inputs_embeds"] = self.causal.get_input_embeddings()(inputs.pop("input_ids")).float()
        if row is not None:
            inputs["choices"] = row
        elif batch.mask is not None:
            inputs["attention_mask"] = self._mask(batch.mask)
        attention = nullcontext() if row is None else attending(self.causal)
        with attention, fast_fp32_products(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
            return self.split.hidden(**inputs)

    def _mask(self, mask: Tensor) -> Any:
        """Give the mask in the form that the decoder takes as it is: ``(batch, 1, query, key)``, for every kind of layer."""
        config = self.causal.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or [])
        four = mask[:, None].to(self.device)
        if config._attn_implementation == "eager":
            four = torch.zeros(four.shape, device=self.device).masked_fill(~four, torch.finfo(torch.float32).min)
        return {kind: four for kind in kinds} if len(kinds) > 1 else four

    def _through_head(self, states: Tensor, batch: Batch, margins: bool) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each target, and by how much it leads."""
        which = torch.tensor(batch.which, device=states.device)
        targets = torch.tensor(batch.targets, device=states.device)
        values = torch.empty(len(which), device=states.device)
        leads = torch.empty_like(values)
        with fast_fp32_products(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
            for start in range(0, len(states), HEAD_ROWS):
                logits = self.split.logits(states[start : start + HEAD_ROWS]).float()
                asked = ((which >= start) & (which < start + HEAD_ROWS)).nonzero().squeeze(-1)
                row, wanted = which[asked] - start, targets[asked]
                best, chosen = logits.amax(-1), logits[row, wanted]
                lead = chosen - best[row]
                if margins:
                    greedy = (lead == 0).nonzero().squeeze(-1)
                    others = logits[row[greedy]].scatter_(1, wanted[greedy, None], float("-inf"))
                    lead[greedy] = best[row[greedy]] - others.amax(-1)
                else:  # above zero by definition
                    lead[lead == 0] = torch.finfo(torch.float32).tiny
                values[asked] = chosen - (logits.sub_(best[:, None]).exp_().sum(-1).log_() + best)[row]
                leads[asked] = lead
                sharp = self.split.logits_of(states[which[asked]], wanted) if self.fast else None
                if sharp is not None:  # bf16 rounds a logit by up to a sixteenth
                    values[asked] += sharp - chosen
        return values, leads
