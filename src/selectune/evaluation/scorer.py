"""Scores texts under a model, fast, with the decisions of the slow way.

Knows: log-likelihoods of continuations, losses of texts, and greedy answers. Log-likelihoods are computed in bf16 where that is
fast, and every question whose choices lie closer together than the measured rounding noise is scored again in fp32, so that
decisions are those of fp32 at batch size 1. Greedy answers are generated in fp32.
Does not know: what a benchmark is, and how a forward pass is laid out.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from selectune.evaluation.answers import Writer
from selectune.evaluation.engine import Engine, Predictions
from selectune.evaluation.near_ties import NearTies, Score
from selectune.evaluation.rows import Pair, questions_of
from selectune.models.anatomy import context_length
from selectune.training.allocator import keep_freed_memory


class Scorer:
    """Scores token sequences.

    Args:
        model: a causal model or a PEFT model around one. tokenizer: its tokenizer.
        bfloat16: score in bf16 first. batch_tokens: tokens in one forward pass, padding included.
    """

    def __init__(
        self, model: Any, tokenizer: Any, bfloat16: bool = False, batch_tokens: int = 2048, progress: bool = False
    ) -> None:
        keep_freed_memory()
        self.model, self.tokenizer = model.eval(), tokenizer
        self._bfloat16, self._batch_tokens, self._progress = bfloat16, batch_tokens, progress
        self._engines: dict[bool, Engine] = {}
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.max_length = min(context_length(causal), 8192)
        self.questions = self.decided_again = 0
        """Questions decided so far, and those of them that were decided in fp32 after bf16."""

    def _engine(self, fast: bool) -> Engine:
        """Return the model, ready to run in bf16 or in fp32 (then a copy, if its weights are not fp32)."""
        if fast not in self._engines:
            model, like = self.model if fast else self._in_fp32(), self._engines.get(not fast)
            self._engines[fast] = Engine(model, fast, self._batch_tokens, like)
        return self._engines[fast]

    def _in_fp32(self) -> Any:
        if any(getattr(value, "quant_state", None) is not None for value in self.model.parameters()):
            return self.model  # 4-bit weights are expanded to the dtype of what meets them
        if all(value.dtype == torch.float32 for value in self.model.parameters()):
            return self.model
        return copy.deepcopy(self.model).float()

    # -- log-likelihoods ---------------------------------------------------------------------------------------------

    def loglikelihoods(
        self, pairs: Sequence[Pair], lengths: Sequence[int] | None = None, questions: Sequence[Hashable] | None = None
    ) -> list[tuple[float, bool]]:
        """Return, for each pair of context and continuation tokens, ``(sum of log-probabilities, is it the greedy one)``.

        Args:
            pairs: neither contexts nor continuations may be empty. lengths: of the continuations' texts, for questions that are
                decided by length-normalised scores; near-ties are looked for under them too. questions: which question each
                pair belongs to; pairs of one context do when left out.

        Raises:
            ValueError: a context or a continuation is empty.
        """
        if any(not context or not continuation for context, continuation in pairs):
            raise ValueError("a context or a continuation is empty")
        cut = [self._cut(pair) for pair in pairs]
        members: dict[Hashable, list[int]] = {}
        for index, (context, _) in enumerate(cut):
            members.setdefault(tuple(context) if questions is None else questions[index], []).append(index)
        groups = list(members.values())
        single = {group[0] for group in groups if len(group) == 1}
        self.questions += len(groups)

        def scored(indices: Sequence[int], fast: bool, what: str) -> dict[int, Score]:
            found = {}
            for margins in (False, True):  # leads over all other words are asked for where they decide
                asked = {index: cut[index] for index in indices if (index in single) == margins}
                found.update(_summed(self._run(asked, fast, what, margins)))
            return found

        everything = scored(range(len(cut)), self._bfloat16, "scoring")
        scores = [everything[index] for index in range(len(cut))]
        if self._bfloat16:
            ties = NearTies(groups, [len(continuation) for _, continuation in cut], lengths)
            scores = ties.settle(scores, lambda indices: scored(indices, False, "deciding near-ties in fp32"))
            self.decided_again += len(ties.again)
        return [(score.total, score.greedy) for score in scores]

    def _cut(self, pair: Pair) -> Pair:
        """Cut a context from the left so that it fits."""
        context, continuation = list(pair[0]), list(pair[1])
        room = self.max_length + 1 - len(continuation)
        return (context[-room:] if room > 0 else context[-1:]), continuation

    def _run(self, pairs: dict[int, Pair], fast: bool, what: str, margins: bool = False) -> Iterator[Predictions]:
        passes = self._engine(fast).predict(questions_of(pairs), margins) if pairs else []
        for forward in self._watched(passes, what):
            yield forward()

    # -- losses of texts ---------------------------------------------------------------------------------------------

    def token_nll(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the negative log-likelihood, in nats, of every token but the first of each text."""
        pairs: dict[int, Pair] = {
            number: (list(text[:1]), list(text[1:])) for number, text in enumerate(texts) if len(text) > 1
        }  # a context in common would put texts in one row: each is asked by itself
        result: list[list[float]] = [[] for _ in texts]
        engine = self._engine(self._bfloat16)
        questions = [question for number, pair in pairs.items() for question in questions_of({number: pair})]
        for forward in self._watched(engine.predict(questions) if questions else [], "reading"):
            found = forward()
            for owner, value in zip(found.owners, found.values, strict=True):
                result[owner].append(-value)
        return result

    def states(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """Return, for each pair of context and continuation tokens, the hidden states that predict the continuation, ``(tokens, hidden)``."""
        found: list[list[Tensor]] = [[] for _ in pairs]
        engine = self._engine(self._bfloat16)
        for forward in self._watched(engine.states_before(questions_of(dict(enumerate(pairs)))), "comparing"):
            owners, states = forward()
            for owner, state in zip(owners, states, strict=True):
                found[owner].append(state)
        return [torch.stack(states) for states in found]

    def log_probabilities(self, states: Tensor) -> Tensor:
        """Return the log-probabilities of all words at some hidden states, ``(places, vocabulary)`` fp32."""
        return self._engine(self._bfloat16).log_probabilities(states)

    # -- greedy answers ----------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str] = (), batch_size: int = 32
    ) -> list[str]:
        """Return the greedy continuation of each prompt, up to the end of the turn, a stop string, or the limit.

        The beginning that all prompts share (few-shot examples, a system message) is computed once; an answer that ends makes
        place for the next prompt.
        """
        if not prompts:
            return []
        cut = [list(prompt)[-(self.max_length - max_new_tokens) :] for prompt in prompts]
        writer = Writer(self._engine(False), self.tokenizer, max_new_tokens, stop, batch_size)
        answers = [""] * len(prompts)
        for number, text in self._watched(writer.write(cut), "answering", len(prompts)):
            answers[number] = text
        return answers

    def _watched(self, items: Any, what: str, total: int | None = None) -> Iterator[Any]:
        total = len(items) if total is None else total
        if not self._progress or total < 3:
            yield from items
            return
        with Progress(console=Console(file=sys.__stderr__), transient=True) as progress:
            yield from progress.track(items, total=total, description=what)


def _summed(batches: Iterator[Predictions]) -> dict[int, Score]:
    found: dict[int, Score] = {}
    for batch in batches:
        for owner, value, margin in zip(batch.owners, batch.values, batch.margins, strict=True):
            total, least = found.get(owner, (0.0, float("inf")))
            found[owner] = Score(total + value, min(least, margin))
    return found
