"""Whole transformer blocks: the best by Fisher score, and the controls that any choice of blocks must beat.

Knows: how k of the base's blocks are chosen. Does not know: how scores are computed (``scores.py``).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from selectune.errors import UserError
from selectune.parameters.factors.gradients import first, rows_of
from selectune.parameters.factors.scores import block_norms, fisher_diagonal, top
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection


class Blocks(ParameterMethod):
    """k whole blocks; embeddings, norms outside the blocks and the head stay as they are."""

    family: ClassVar[str] = "blocks"
    usual_form: ClassVar[str] = "lora"

    k: Annotated[int, Field(gt=0)] = 8
    """How many blocks train."""

    @abstractmethod
    def choose(self, context: Context, count: int) -> list[int]:
        """Return the k chosen blocks of ``count``."""

    def select(self, context: Context) -> Selection:
        blocks = context.base.anatomy.blocks
        if self.k > len(blocks):
            raise UserError(f"{self.k} blocks are asked for and the base has {len(blocks)}", field="parameters.k",
                            expected=f"at most {len(blocks)}")  # fmt: skip
        chosen = self.choose(context, len(blocks))
        return Selection.of(context.base.model, [name for index in chosen for name in blocks[index].parameters])


class FisherBlocks(Blocks):
    """The k blocks with the highest sum of Frobenius norms of their tensors' diagonal Fisher information."""

    name: ClassVar[str] = "fisher_blocks"
    paper: ClassVar[str] = "On Surgical Fine-tuning for Language Encoders, EMNLP Findings 2023, arXiv 2310.17041"
    summary: ClassVar[str] = "The k blocks with the highest diagonal Fisher information on the training data."
    departs: ClassVar[str] = (
        "A causal model instead of an encoder: the score of an example is the log-likelihood of its response tokens, and "
        "the embeddings stay frozen. The released code scores one and the same example a hundred times and "
        "back-propagates the label's logit; here each example counts once, by its log-probability, as the paper says, and 64 are scored. "
        "The chosen blocks train by LoRA where no form is named; `form: full` is the paper's."
    )

    examples: Annotated[int, Field(gt=0)] = 64
    """Training examples to score on, the first by hash of their content (the paper: 100)."""
    labels: Literal["true", "sampled"] = "true"
    """The empirical Fisher (true responses) or the Fisher with responses sampled from the model."""

    def choose(self, context: Context, count: int) -> list[int]:
        model, blocks = context.base.model, context.base.anatomy.blocks
        rows = rows_of(context, first(context.train, self.examples))
        examples = [(row["input_ids"], row["labels"]) for row in rows]
        names = [name for block in blocks for name in block.parameters]
        fisher = fisher_diagonal(
            model, examples, names, self.labels, context.generator, context.meter, context.bfloat16, context.quiet
        )
        context.block_scores.update(block_norms(fisher, [(block.index, block.parameters) for block in blocks]))
        context.examples_scored = len(examples)
        return self.pick(context.block_scores)

    def pick(self, scores: dict[int, float]) -> list[int]:
        return top(scores, self.k)


class LowestFisherBlocks(FisherBlocks):
    """Control: the k blocks with the lowest Fisher score."""

    name: ClassVar[str] = "lowest_fisher_blocks"
    family: ClassVar[str] = "controls"
    summary: ClassVar[str] = "Control: the k blocks with the lowest Fisher information."

    def pick(self, scores: dict[int, float]) -> list[int]:
        return top(scores, self.k, key=lambda score: score)


class RandomBlocks(Blocks):
    """Control: k blocks at random, by the run's seed."""

    name: ClassVar[str] = "random_blocks"
    family: ClassVar[str] = "controls"
    summary: ClassVar[str] = "Control: k blocks at random."

    def choose(self, context: Context, count: int) -> list[int]:
        return sorted(torch.randperm(count, generator=context.generator)[: self.k].tolist())


class FirstBlocks(Blocks):
    """Control: the k blocks next to the embeddings."""

    name: ClassVar[str] = "first_blocks"
    family: ClassVar[str] = "controls"
    summary: ClassVar[str] = "Control: the k blocks next to the embeddings."

    def choose(self, context: Context, count: int) -> list[int]:
        return list(range(self.k))


class LastBlocks(Blocks):
    """Control: the k blocks next to the head; also the cheapest, since nothing below them needs a backward pass."""

    name: ClassVar[str] = "last_blocks"
    family: ClassVar[str] = "controls"
    summary: ClassVar[str] = "Control: the k blocks next to the head (the cheapest)."

    def choose(self, context: Context, count: int) -> list[int]:
        return list(range(count - self.k, count))


class SpreadBlocks(Blocks):
    """Control: k blocks at even distances, the first and the last among them."""

    name: ClassVar[str] = "spread_blocks"
    family: ClassVar[str] = "controls"
    summary: ClassVar[str] = "Control: k blocks at even distances."

    def choose(self, context: Context, count: int) -> list[int]:
        return sorted({round(i * (count - 1) / max(self.k - 1, 1)) for i in range(self.k)})
