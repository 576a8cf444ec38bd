"""Of each pass over the training records only the most useful and most novel are learnt from: the rest costs a forward pass and nothing else.

Knows: the nuclear norm of a record's logits and their random projection, both without a single logit; the memory of what was learnt from.
Does not know: how records are packed, how a loss is computed, or how a step is run.

A head ``W`` (vocabulary, hidden) is linear: logits ``X = H W^T`` have the Gram matrix ``H (W^T W) H^T``, and whatever is projected from them on the
side of the vocabulary is ``H (W^T M)``. Both small matrices are made once, or anew at each step where the head trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from selectune.data.packing import Spans, record_spans, repacked
from selectune.models.head import SplitModel
from selectune.training import processes
from selectune.training.policies.policy import Batch, Policy, Stage, last_states

WORDS = 4096
"""Words of the vocabulary that are looked at together."""


class UtilityAndDiversity(Policy):
    """Learns from a share of the records of each forward pass: those of the largest logits (nuclear norm) that are unlike what was learnt from."""

    name: ClassVar[str] = "uds"
    paper: ClassVar[str] = "Utility-Diversity Aware Online Batch Selection for LLM Supervised Fine-tuning, 2025, arXiv 2510.16882"
    summary: ClassVar[str] = (
        "Learns from a quarter of each pass's records, by the nuclear norm of their logits and their novelty."
    )
    departs: ClassVar[str] = (
        "The unit is a record, whatever the packing; candidates are those of one forward pass, of which at least one is learnt from (few make "
        "the share coarse, one leaves no choice); padding is no part of a record; scored without dropout and before a soft cap of the logits. "
        "The projection keeps norms, and both terms vary alike unless a weight is given (the code: 0.0025 x sqrt(vocabulary x longest record) "
        "/ 2 here). What was chosen is remembered at the end of a step, and is that of all processes."
    )
    acts: ClassVar[bool] = False
    remembers_on_cpu: ClassVar[bool] = True

    keep: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the records of a forward pass (``training.micro_batch_sequences`` says how many sequences that is) that is learnt from."""
    diversity: Annotated[float, Field(ge=0)] | None = None
    """Weight of the mean distance to what is remembered; left out: so much that it varies among the candidates as the nuclear norm does."""
    per_token: bool = False
    """Divide the nuclear norm by a record's tokens: longer records have larger ones."""
    memory: Annotated[int, Field(gt=0)] = 1024
    """Records that are remembered, the last that were chosen."""
    positions: Annotated[int, Field(gt=0)] = 8
    """Random directions on the side of a record's positions."""
    words: Annotated[int, Field(gt=0)] = 128
    """Random directions on the side of the vocabulary."""
    start: Annotated[int, Field(ge=0)] = 0
    """Steps of plain training before choosing begins."""

    def begin(self, stage: Stage) -> None:
        vocabulary = stage.whole.causal.get_output_embeddings().weight.shape[0]
        longest = max(len(row["input_ids"]) for row in stage.rows)
        source = stage.generator("projection")
        stage.passing["of positions"] = Directions.drawn(longest, self.positions, source)
        stage.passing["of words"] = Directions.drawn(vocabulary, self.words, source)
        stage.passing["chosen"] = []

    def before_step(self, stage: Stage) -> None:
        if stage.whole.split.head_parameters():
            stage.passing.pop("head", None)

    def loss(self, stage: Stage, batch: Batch, plain: Callable[..., Tensor]) -> Tensor:
        spans = record_spans(batch["position_ids"], batch["labels"])
        count = max(1, round(self.keep * len(spans)))
        if stage.step < self.start or count >= len(spans):
            return plain()
        kept = self.choose(stage, batch, spans, count)
        chosen = repacked(batch, [spans[place] for place in kept], alone=len(spans) <= len(batch["input_ids"]))
        stage.numbers["met"] = stage.numbers.get("met", 0) + len(spans)
        stage.numbers["learnt"] = stage.numbers.get("learnt", 0) + len(kept)
        # the mean over what is kept, with the weight that the whole pass has in its batch
        return plain(chosen) * (_learnt_tokens(batch) / _learnt_tokens(chosen))

    @torch.no_grad()
    def choose(self, stage: Stage, batch: Batch, spans: Spans, count: int) -> list[int]:
        """Return the numbers of the records to learn from, in the order of the batch."""
        if "head" not in stage.passing:
            stage.passing["head"] = Head.of(stage.whole.split, stage.passing["of words"])
        head: Head = stage.passing["head"]
        training = stage.whole.training
        stage.whole.eval()
        with last_states(stage.whole) as found:
            stage.whole(
                **{**batch, "weights": torch.zeros_like(batch["labels"], dtype=torch.float32)}
            )  # nothing meets the vocabulary
        stage.whole.train(training)
        stage.meter.count(forward=batch["input_ids"].numel())
        states = found[-1].flatten(0, 1).cpu()
        norms, sketches = zip(*(self.look(head, stage.passing["of positions"], states[a:b]) for a, b in spans), strict=True)
        sketch, known = torch.stack(sketches), stage.tensors.get("remembered")
        novelty = torch.zeros(len(spans), dtype=torch.float64)
        if known is not None:
            novelty = torch.cdist(sketch.float(), known).double().mean(1)
        scores = combined(torch.stack(norms), novelty, self.diversity)
        kept = sorted(scores.argsort(descending=True, stable=True)[:count].tolist())
        stage.passing["chosen"].append(sketch[kept].float())
        return kept

    def look(self, head: Head, positions: Directions, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nuclear norm of a record's logits and their projection, ``(positions x words,)``; fp64.

        Args:
            states: ``(tokens, hidden)``, on the CPU.
        """
        with_one = torch.cat([states.double(), states.new_ones(len(states), 1).double()], dim=1)
        norm = nuclear_norm(with_one, head.gram)
        left = positions.weights(torch.arange(len(states)))
        return norm / len(states) if self.per_token else norm, (left.T @ (with_one @ head.projected)).reshape(-1)

    def gradients(self, stage: Stage) -> None:
        fresh, stage.passing["chosen"] = stage.passing["chosen"], []
        all_fresh = _of_all_processes(fresh)
        if all_fresh:
            known = stage.tensors.get("remembered")
            joined = torch.cat(all_fresh if known is None else [known, *all_fresh])
            stage.tensors["remembered"] = joined[-self.memory :].clone()


@dataclass
class Directions:
    """Random directions in many dimensions: some rows of a Fourier transform (real part) behind random signs; they keep norms on average."""

    signs: Tensor
    """``(dimensions,)``, 1 or -1, fp64."""
    frequencies: Tensor
    """``(directions,)`` int64."""

    @classmethod
    def drawn(cls, dimensions: int, directions: int, source: torch.Generator) -> Directions:
        """Draw signs and frequencies."""
        signs = torch.randint(2, (dimensions,), generator=source).double() * 2 - 1
        return cls(signs, torch.randint(dimensions, (directions,), generator=source))

    def weights(self, some: Tensor) -> Tensor:
        """Return what some dimensions add to each direction, ``(len(some), directions)`` fp64."""
        angle = (some[:, None] * self.frequencies) % len(self.signs) * (2 * math.pi / len(self.signs))
        return self.signs[some, None] * torch.cos(angle) * math.sqrt(2 / len(self.frequencies))


@dataclass
class Head:
    """What a linear head makes of logits, ``hidden + 1`` on the side of the states (the last is the bias); fp64."""

    gram: Tensor
    """``(hidden + 1, hidden + 1)``."""
    projected: Tensor
    """``(hidden + 1, directions)``."""

    @classmethod
    @torch.no_grad()
    def of(cls, split: SplitModel, words: Directions) -> Head:
        """Ask a model's head about each unit vector, some words at a time."""
        weight = next(split.causal.get_output_embeddings().parameters())
        size = split.causal.config.get_text_config().hidden_size
        units = torch.cat([torch.eye(size), torch.zeros(1, size)]).to(weight)
        gram, projected = torch.zeros(size + 1, size + 1).double(), torch.zeros(size + 1, len(words.frequencies)).double()
        first = 0
        for logits in split.logits_by_words(units, WORDS):
            said = logits.float().cpu()
            said[:-1] -= said[-1]
            gram += said @ said.T
            some = torch.arange(first, first + said.shape[1])
            projected += said.double() @ words.weights(some)
            first += said.shape[1]
        return cls(gram, projected)


def nuclear_norm(states: Tensor, gram: Tensor) -> Tensor:
    """Return the sum of the singular values of ``states @ W^T``, given ``gram = W^T W``.

    Args:
        states: ``(tokens, hidden)`` fp64.
    """
    return torch.linalg.eigvalsh(states @ gram @ states.T).clamp(min=0).sqrt().sum()


def combined(utility: Tensor, novelty: Tensor, weight: float | None) -> Tensor:
    """Return ``utility + weight * novelty``, ``(candidates,)``; without a weight, the one with which both vary alike."""
    if weight is None:
        spread = float(novelty.std(correction=0))
        weight = float(utility.std(correction=0)) / spread if spread > 0 else 0.0
    return utility + weight * novelty


def _learnt_tokens(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def _of_all_processes(values: list[Tensor]) -> list[Tensor]:
    if processes.count() == 1:
        return values
    from accelerate.utils import gather_object

    found: list[Any] = gather_object(values)
    return found
