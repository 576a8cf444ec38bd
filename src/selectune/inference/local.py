"""Answers of a model on this machine.

Knows: how many answers are written at once, and how an answer drawn at random depends on its question and a seed alone. Does not know: what is asked.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selectune.inference.remembering import Question, Rehearsal, Remembering
from selectune.models.anatomy import context_length, end_tokens

if TYPE_CHECKING:
    from selectune.meter import Meter

TOGETHER = 32
"""Answers that are written at once."""


class LocalResponder(Remembering):
    """A model on this machine answers, many questions at once.

    The likeliest answer is the greedy one. One drawn at random adds Gumbel noise to the logits over the temperature and takes the largest, which
    draws from the model's own distribution; the noise follows from the question, its sample's number and the seed.

    Args:
        base: the model. encoder: turns messages into its tokens. meter: counts tokens. trained: how the model was trained since it was loaded,
            so that its answers are told from the base's.
    """

    def __init__(
        self,
        base: Any,
        encoder: Any,
        meter: Meter | None = None,
        kept: Path | None = None,
        quiet: bool = False,
        rehearsal: Rehearsal | None = None,
        trained: str = "",
    ) -> None:
        super().__init__(kept, quiet, rehearsal)
        self.base, self.encoder, self.meter = base, encoder, meter
        self.model = f"{base.fingerprint} {encoder.system or ''} {trained}"

    @cached_property
    def _model(self) -> Any:
        """The model; a copy in bf16 of one in bf16 whose trained part is kept in fp32."""
        model = self.base.model
        kinds = {weight.dtype for weight in model.parameters()}
        return copy.deepcopy(model).to(torch.bfloat16) if kinds == {torch.float32, torch.bfloat16} else model

    def ask(self, questions: list[Question]) -> Iterator[tuple[Question, str]]:
        """Write the answers, the shortest prompts first (see :meth:`Remembering.ask`)."""
        prompts = {question: self.encoder.prompt_ids(question.messages) for question in questions}
        ordered = sorted(questions, key=lambda question: (question.max_new_tokens, question.temperature, len(prompts[question])))
        for start in range(0, len(ordered), TOGETHER):
            some = ordered[start : start + TOGETHER]
            yield from zip(some, self._write(some, [prompts[question] for question in some]), strict=True)

    @torch.no_grad()
    def _write(self, questions: list[Question], prompts: list[list[int]]) -> list[str]:
        from transformers import GenerationConfig, LogitsProcessorList

        model, words = self._model, self.base.tokenizer
        context = context_length(model)
        limit = min(max(question.max_new_tokens for question in questions), context // 2)
        prompts = [prompt[-(context - limit) :] for prompt in prompts]
        width, device = max(map(len, prompts)), model.get_input_embeddings().weight.device
        ids = torch.tensor([[words.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        settings = GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=end_tokens(model, words),
            pad_token_id=words.pad_token_id,
        )
        written = model.generate(input_ids=ids, attention_mask=real, generation_config=settings,
                                 logits_processor=LogitsProcessorList([_Drawn(questions)]))[:, width:]  # fmt: skip
        if self.meter is not None:
            self.meter.count(forward=int(real.sum()) + written.numel())
        return [
            words.decode(row[: question.max_new_tokens], skip_special_tokens=True).strip()
            for question, row in zip(questions, written, strict=True)
        ]


class _Drawn:
    """Noise on logits that makes the largest a draw."""

    def __init__(self, questions: list[Question]) -> None:
        self._temperatures = [question.temperature for question in questions]
        self._generators = [torch.Generator().manual_seed(int(question.key("drawn")[:15], 16)) for question in questions]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        for row, (temperature, generator) in enumerate(zip(self._temperatures, self._generators, strict=True)):
            if temperature > 0:
                noise = -torch.empty(scores.shape[1]).exponential_(generator=generator).log()
                scores[row] = scores[row] / temperature + noise.to(scores.device)
        return scores
