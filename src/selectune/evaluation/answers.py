"""Writes greedy answers, many at once, each the one that it would be alone.

Knows: the beginning that all prompts share, answers that end and make place for waiting prompts, ends of turns and stop strings.
Prompts are read end to end and every answer keeps its keys and values where they are; a model that does not take this kind of
attention writes with transformers' own cache.
Does not know: what is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from selectune.evaluation.engine import END_TO_END, PLAIN, Engine
from selectune.evaluation.rows import SHORTEST_PREFIX, Question, end_to_end, lay_end_to_end
from selectune.models.anatomy import end_tokens
from selectune.models.attention_of_answers import NAME, Answers
from selectune.models.attention_of_choices import Row, attending
from selectune.models.products import fast_fp32_products

ROWS_FOR_FAST_PRODUCTS = 8
"""With fewer answers in work products are vectors by matrices, which every library is equally slow at."""


class Writer:
    """Writes answers.

    Args:
        engine: the model, in fp32. tokenizer: its tokenizer. limit: tokens of an answer. stop: strings that end one.
        places: answers in work at once.
    """

    def __init__(self, engine: Engine, tokenizer: Any, limit: int, stop: Sequence[str], places: int) -> None:
        self._engine, self._tokenizer, self._limit, self._stop, self._places = engine, tokenizer, limit, stop, places
        self._ends = set(end_tokens(engine.causal, tokenizer))

    def write(self, prompts: list[list[int]]) -> Iterator[tuple[int, str]]:
        """Yield the number of a prompt and its answer, as answers end."""
        reach = max(map(len, prompts)) + self._limit
        together = self._engine.fits(reach) and _agrees(self._engine)
        for number, tokens in (self._together if together else self._with_cache)(prompts):
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            for mark in self._stop:
                text = text.split(mark)[0] if mark else text
            yield number, text

    def _goes_on(self, answer: list[int], token: int) -> bool:
        """Add a token to an answer, and say whether there is more to write."""
        if token in self._ends:
            return False
        answer.append(token)
        if self._stop and any(mark in self._tokenizer.decode(answer[-24:]) for mark in self._stop):
            return False
        return len(answer) < self._limit

    # -- with keys and values that stay where they are -----------------------------------------------------------------

    def _together(self, prompts: list[list[int]]) -> Iterator[tuple[int, list[int]]]:
        shared = shared_beginning(prompts)
        (prefix,) = self._engine.keys_and_values([prompts[0][:shared]])
        waiting = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))  # the longest are last, and first to go
        written: list[list[int]] = [[] for _ in prompts]
        answers = Answers(prefix)
        work: list[int] = []  # the prompts that are being answered, in the order of the answers
        while waiting or work:
            free = self._places - len(work)
            if waiting and (not work or free >= max(1, self._places // 4)):
                entering = [waiting.pop() for _ in range(min(free, len(waiting)))]
                tokens = read_prompts(self._engine, [Question(prompts[n], {}, shared) for n in entering], answers).tolist()
                first = len(work)
                work += entering
            else:
                lasts, places = [written[number][-1] for number in work], [len(prompts[n]) + len(written[n]) - 1 for n in work]
                tokens, first = step(self._engine, lasts, places, answers).tolist(), 0
            for place in reversed(range(first, len(work))):
                number = work[place]
                if not self._goes_on(written[number], tokens[place - first]):
                    answers.leave(place)
                    work[place] = work[-1]
                    work.pop()
                    yield number, written[number]

    # -- with transformers' cache --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _with_cache(self, prompts: list[list[int]]) -> Iterator[tuple[int, list[int]]]:
        count = 1 if self._engine.way == PLAIN else self._places
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        for start in range(0, len(order), count):
            yield from self._batch_with_cache({number: prompts[number] for number in order[start : start + count]})

    def _batch_with_cache(self, prompts: dict[int, list[int]]) -> Iterator[tuple[int, list[int]]]:
        device, width = self._engine.device, max(map(len, prompts.values()))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts.values()], device=device)
        real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts.values()], device=device)
        positions, cache = (real.cumsum(-1) - 1).clamp(min=0), None
        written: dict[int, list[int]] = {number: [] for number in prompts}
        work = list(prompts)
        while work:
            out = self._engine.causal(input_ids=ids, attention_mask=real, position_ids=positions, past_key_values=cache,
                                      use_cache=True, logits_to_keep=1)  # fmt: skip
            cache, tokens = out.past_key_values, out.logits[:, -1].argmax(-1)
            going = [r for r, token in enumerate(tokens.tolist()) if self._goes_on(written[work[r]], token)]
            yield from ((number, written[number]) for row, number in enumerate(work) if row not in going)
            if 0 < len(going) < len(work):  # finished answers leave the batch
                cache.batch_select_indices(torch.tensor(going, device=device))
            ids, positions = tokens[going, None], positions[going, -1:] + 1
            real = torch.nn.functional.pad(real[going], (0, 1), value=1)
            work = [work[row] for row in going]


def shared_beginning(prompts: list[list[int]]) -> int:
    """Return how many tokens all prompts share at their beginning, at least one left over in each; 0 where it is not worth it."""
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    found = next((i for i in range(limit) if first[i] != last[i]), limit)
    return found if found >= SHORTEST_PREFIX and len(prompts) > 1 else 0


@torch.no_grad()
def read_prompts(engine: Engine, prompts: list[Question], answers: Answers) -> Tensor:
    """Read prompts, take them in among the answers, and return the first token of each answer, ``(prompts)``."""
    found = []
    for run in end_to_end(prompts, engine.row_tokens):
        batch = lay_end_to_end(run)
        row = Row(batch.parts, answers.prefix, keep=True)
        states = engine.states(batch, END_TO_END, row)
        answers.enter(row.kept, [question.read for question in run])
        with fast_fp32_products():
            found.append(engine.split.logits(states).argmax(-1))
    return torch.cat(found)


@torch.no_grad()
def step(engine: Engine, tokens: list[int], places: list[int], answers: Answers) -> Tensor:
    """Write one more token of every answer in work.

    Args:
        tokens: the last one of each answer, which no pass has read yet. places: their positions.
    """
    answers.begin_step()
    with attending(engine.causal, NAME), fast_fp32_products() if len(tokens) >= ROWS_FOR_FAST_PRODUCTS else nullcontext():
        hidden = engine.split.hidden(input_ids=torch.tensor([tokens]), position_ids=torch.tensor([places]), answers=answers)
        return engine.split.logits(hidden[0]).argmax(-1)


@torch.no_grad()
def _agrees(engine: Engine) -> bool:
    """Whether answers written together begin as plain forward passes say, on two short prompts (tried once)."""
    if engine.writes_together is None:
        size = engine.causal.config.get_text_config().vocab_size
        tokens = [(5 * i + 2) % size for i in range(24)]
        prompts, shared = [tokens[:12], [*tokens[:6], *tokens[18:21]]], 4
        try:
            answers = Answers(*engine.keys_and_values([tokens[:shared]]))
            found = [read_prompts(engine, [Question(prompt, {}, shared) for prompt in prompts], answers).tolist()]
            for _ in range(3):
                places = [len(prompt) + len(found) - 1 for prompt in prompts]
                found.append(step(engine, found[-1], places, answers).tolist())
        except (ValueError, TypeError, RuntimeError, AttributeError):
            engine.writes_together = False
            return False
        alone = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in found:
                ids.append(int(engine.causal(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            alone.append(ids[len(prompt) :])
        engine.writes_together = [list(row) for row in zip(*found, strict=True)] == alone
    return engine.writes_together
