"""Training against a worst-case noise on the embeddings, with gradients kept at random by importance.

Knows: the noise, the loss on both inputs, the importance of entries and the multipliers drawn from it. Does not know: how a multiplier is
applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from selectune.errors import UserError
from selectune.training import processes
from selectune.training.policies.masked import Masked
from selectune.training.policies.policy import Batch, Stage, last_states

START = 1e-5
"""Size of the noise from which the direction is found."""
LEAST = 0.01
"""The smallest probability of being kept that a multiplier is divided by."""


class RoAST(Masked):
    """Half the loss on noisy embeddings, agreement of both predictions, and importance-weighted stochastic gradient masks."""

    name: ClassVar[str] = "roast"
    paper: ClassVar[str] = (
        "RoAST: Robustifying Language Models via Adversarial Perturbation with Selective Training, Findings of EMNLP 2023, arXiv 2312.04032"
    )
    summary: ClassVar[str] = "Adversarial noise on embeddings, and gradients kept at random by their importance."
    departs: ClassVar[str] = (
        "The noise is measured in root mean squares of the embeddings and the divergence is a mean over response tokens; what is kept is "
        "divided by 0.01 at the least. Importance is of sequences before the first epoch, and of batches after."
    )
    changes_what_trains: ClassVar[bool] = True

    epsilon: Annotated[float, Field(ge=0)] = 0.1
    """Largest noise, in root mean squares of the embeddings; 0: no noise."""
    agreement: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the symmetric divergence between the predictions with and without noise."""
    masked: bool = True
    """Keep gradients at random by importance."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Relative rank of importance at which an entry is kept half of the time."""
    sharpness: Annotated[float, Field(gt=0)] = 10.0
    """How fast the probability rises there."""
    rescale: bool = True
    """Divide what is kept by its probability, so that the mean gradient stays the same."""
    every: Annotated[int, Field(gt=0)] | None = None
    """Steps between two draws; left out: an epoch."""
    examples: Annotated[int, Field(gt=0)] = 64
    """Sequences for the importance before the first draw."""

    @model_validator(mode="after")
    def _of_gradients(self) -> RoAST:
        if self.masked and self.rescale and self.mask == "update":
            raise ValueError("what is kept is divided by its probability, which makes steps of updates up to a hundred times too long: "
                             "`mask: gradient`, or `rescale: false`")  # fmt: skip
        return self

    @property
    def copies(self) -> int:  # type: ignore[override]
        """Beside the factors their sums of squares."""
        return super().copies + self.masked

    def before_step(self, stage: Stage) -> None:
        stage.passing["micro"] = 0
        period = stage.epoch if self.every is None else stage.step // self.every
        if self.masked and stage.numbers.get("period") != period:
            self._draw(stage)
            stage.numbers["period"] = period

    def _draw(self, stage: Stage) -> None:
        """Draw the multipliers of all entries in blocks, by the gradients since the last time."""
        if "period" not in stage.numbers:
            for batch in stage.sample(self.examples, "importance"):
                self._note(stage, stage.gradient(batch))
        sums = {name: stage.tensors.pop(f"squares.{name}") for name in stage.parameters if f"squares.{name}" in stage.tensors}
        if not sums:
            raise UserError(
                "nothing that trains lies in a block", field="policy", expected="`masked: false`, or weights in the blocks"
            )
        drawn = multipliers(sums, self.threshold, self.sharpness, self.rescale, stage.generator("mask"))
        stage.tensors |= {f"multiplier.{name}": value for name, value in drawn.items()}

    def _note(self, stage: Stage, gradients: dict[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            if stage.block(name) is not None:
                total = stage.tensors.setdefault(f"squares.{name}", torch.zeros_like(gradient))
                total.addcmul_(gradient, gradient)

    def loss(self, stage: Stage, batch: Batch, plain: Callable[[], Tensor]) -> Tensor:
        if self.epsilon == 0:
            return plain()
        embeddings = stage.whole.causal.get_input_embeddings()
        size = self.epsilon * float(embeddings.weight.detach().float().pow(2).mean().sqrt())
        shape = (*batch["input_ids"].shape, stage.anatomy.hidden_size)
        source = stage.generator(f"noise/{stage.passing['micro']}/{processes.rank()}")
        stage.passing["micro"] += 1
        noise = (torch.rand(shape, generator=source) * START).to(batch["input_ids"].device).requires_grad_()
        with _added(embeddings, noise):
            (direction,) = torch.autograd.grad(stage.mean_loss(batch), noise)
        worst = noise.detach() + size * direction / direction.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        with last_states(stage.whole) as clean:
            usual = plain()
        with _added(embeddings, worst), last_states(stage.whole) as noisy:
            other = plain()
        total = 0.5 * usual + 0.5 * other
        return total + self.agreement * _divergence(stage, batch, clean[0], noisy[0]) if self.agreement else total

    def factors(self, stage: Stage) -> dict[str, Tensor]:
        if not self.masked:
            return {}
        self._note(stage, {name: gradient for name, _, gradient in stage.gradients()})
        return {name: stage.tensors[f"multiplier.{name}"] for name in stage.parameters if f"multiplier.{name}" in stage.tensors}


def multipliers(
    importance: dict[str, Tensor], threshold: float, sharpness: float, rescale: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return 0 or (rescaled) 1 for every entry, drawn by its rank among all entries."""
    every = torch.cat([value.reshape(-1) for value in importance.values()])
    rank = torch.empty_like(every)
    rank[every.argsort(stable=True)] = torch.linspace(0, 1, len(every), device=every.device)
    kept = torch.sigmoid(2 * sharpness * (rank - threshold))
    drawn = (torch.rand(len(every), generator=generator).to(every.device) < kept).float()
    values = drawn / kept.clamp(min=LEAST) if rescale else drawn
    pieces = values.split([value.numel() for value in importance.values()])
    return {name: piece.view(importance[name].shape).clone() for name, piece in zip(importance, pieces, strict=True)}


def _divergence(stage: Stage, batch: Batch, clean: Tensor, noisy: Tensor) -> Tensor:
    """Half the sum of both divergences between two predictions: this micro-batch's share of the mean over response tokens."""
    counts = batch["labels"][:, 1:] != -100
    with stage.autocast():
        one, other = (stage.whole.split.logits(states[:, :-1][counts]).float().log_softmax(-1) for states in (clean, noisy))
    return 0.5 * ((one.exp() - other.exp()) * (one - other)).sum() / stage.tokens


@contextmanager
def _added(embeddings: Any, noise: Tensor) -> Iterator[None]:
    """Within, a noise is added to what the embeddings give; the table has no gradient from there."""
    handle = embeddings.register_forward_hook(lambda module, inputs, output: output.detach() + noise.to(output.dtype))
    try:
        yield
    finally:
        handle.remove()
