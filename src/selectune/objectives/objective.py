"""What every objective has in common.

Knows: that a loss is a sum over response tokens, each with a weight; that only positions that count meet the vocabulary, a chunk at a
time; that a chunk's gradient is taken at once, so that the logits of a whole batch never exist together and no product is made
twice; and that a few rows of them at a time are fp32. Does not know: the formula, which is the objective's own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selectune.catalogue import Method

CHUNK = 256
"""Positions that meet the vocabulary at once: 25 MB of bf16 logits at 49,152 entries, which their gradient replaces."""
CHUNK_OF_TRAINED_HEAD = 512
"""The same where the head trains: each chunk makes a gradient of the head's size."""
ROWS = 16
"""Positions whose logits are in fp32 at once on a CPU, so that they stay in its cache; elsewhere all of a chunk."""

LOG2_E = 1 / math.log(2)
"""Powers of two are made several times faster than those of e."""

Head = Callable[[Tensor], Tensor]


class _LogProbability(torch.autograd.Function):
    """The log-probability of the targets, in fp32 from logits of any dtype, of which no fp32 copy is made or kept.

    The gradient takes the place of half-precision logits: 25 MB a chunk that need not be found, cleared and fetched.
    The gradient of a logit, ``given * ([is the target] - probability)``, is rounded once for each of its factors; that of the target comes
    from the fp32 log-probability, so that it is exact where the probability is close to one.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        found = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
        size = ROWS if logits.device.type == "cpu" else max(len(logits), 1)
        rows = torch.empty(min(size, len(logits)), logits.shape[-1], dtype=torch.float32, device=logits.device)
        for some, wanted, result in zip(logits.split(size), targets.split(size), found.split(size), strict=True):
            exact = rows[: len(some)].copy_(some)
            highest = exact.amax(-1, keepdim=True)
            below = exact.gather(1, wanted[:, None]) - highest
            torch.add(highest * -LOG2_E, exact, alpha=LOG2_E, out=exact).exp2_()
            torch.sub(below, exact.sum(-1, keepdim=True).log_(), out=result[:, None])
        ctx.save_for_backward(logits, targets, found)
        return found

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        logits, targets, found = ctx.saved_tensors
        own = (
            logits if logits.dtype != torch.float32 else None
        )  # others keep their fp32 copy; in fp32 they keep the logits themselves
        gradient = torch.softmax(logits, -1, out=own).mul_(-given[:, None].to(logits.dtype))
        gradient[torch.arange(len(targets), device=targets.device), targets] = (-given * found.expm1()).to(logits.dtype)
        return gradient, None


@dataclass
class Predictions:
    """What a model says about the next token at some positions."""

    raw: Tensor
    """``(positions, vocabulary)`` logits in the dtype of the computation."""
    targets: Tensor
    """``(positions,)`` int64: the tokens that came."""
    reference_logits: Tensor | None = None
    """``(positions, vocabulary)`` fp32 of the reference model, without gradient, for objectives that ask for one."""

    def __post_init__(self) -> None:
        self.log_probability: Tensor = _LogProbability.apply(self.raw, self.targets)  # type: ignore[no-untyped-call]
        """``(positions,)`` fp32 log-probability of each target."""

    @cached_property
    def logits(self) -> Tensor:
        """``(positions, vocabulary)`` fp32, for objectives that need all of them."""
        return self.raw.float()

    @cached_property
    def log_partition(self) -> Tensor:
        """Logarithm of the sum of the exponentials of the logits, ``(positions,)``."""
        return self.logits.gather(-1, self.targets[:, None]).squeeze(-1) - self.log_probability

    def entropy(self) -> Tensor:
        """Return the entropy of each prediction in nats, ``(positions,)``."""
        log_probabilities = self.logits - self.log_partition[:, None]
        return -(log_probabilities.exp() * log_probabilities).sum(-1)


@dataclass
class Loss:
    """A loss and what is known of each token in it."""

    total: Tensor
    """The weighted sum of the tokens' losses: a scalar, with gradient."""
    log_probability: Tensor
    """``(positions,)`` fp32 of the targets, without gradient, in the order of the batch."""
    entropy: Tensor | None
    """``(positions,)`` fp32 in nats, where it was asked for."""


class Objective(Method, ABC):
    """A loss on next-token predictions."""

    axis: ClassVar[str] = "objectives"
    needs_reference: ClassVar[bool] = False
    """Whether the formula needs what the untrained base says."""

    @abstractmethod
    def losses(self, said: Predictions) -> Tensor:
        """Return the loss of each position in fp32, ``(positions,)``."""

    def total(self, head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the losses alone, see :meth:`loss`."""
        return self.loss(head, hidden, labels).total

    def loss(
        self,
        head: Head,
        hidden: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        reference: tuple[Head, Tensor] | None = None,
        head_parameters: Iterable[Tensor] | None = None,
        entropy: bool = False,
    ) -> Loss:
        """Return the weighted sum of the losses over the positions whose next token has a label.

        Args:
            head: hidden states to logits.
            hidden: ``(batch, length, hidden size)``.
            labels: ``(batch, length)`` int64, -100 where nothing is learnt; shifted here, not by the caller.
            weights: ``(batch, length)`` of the tokens in ``labels``; a token of weight 0 never meets the vocabulary.
            reference: the head and the hidden states, of the same shape, of the reference model.
            head_parameters: what trains in the head; each chunk's gradient is taken at once, for these and the hidden states. Left
                out, every chunk is kept for a backward pass to whatever the head is made of.
            entropy: return the predictions' entropies too.
        """
        wanted = labels[:, 1:].reshape(-1)
        counts = wanted != -100
        if weights is not None:
            counts = counts & (weights[:, 1:].reshape(-1) != 0)
        kept = counts.nonzero().squeeze(-1)
        parameters = [value for value in head_parameters or () if value.requires_grad]
        chunks = _Chunks(
            objective=self,
            head=head,
            targets=wanted[kept],
            weights=None if weights is None else weights[:, 1:].reshape(-1)[kept].float(),
            reference=None if reference is None else (reference[0], _kept(reference[1], kept)),
            entropy=entropy,
            gradient=torch.is_grad_enabled() and (hidden.requires_grad or bool(parameters)),
        )
        states = _kept(hidden, kept)
        if head_parameters is None:
            parts = [chunks.part(states[start : start + CHUNK], start) for start in range(0, max(len(kept), 1), CHUNK)]
            total = torch.stack([part.total for part in parts]).sum()
            spread = [part.entropy.detach() for part in parts if part.entropy is not None]
            found = torch.cat([part.log_probability.detach() for part in parts])
            return Loss(total, found, torch.cat(spread) if entropy else None)
        total, found, spread_of = _GradientAtOnce.apply(chunks, states, *parameters)  # type: ignore[no-untyped-call]
        return Loss(total, found, spread_of if entropy else None)


def _kept(hidden: Tensor, kept: Tensor) -> Tensor:
    return hidden[:, :-1].reshape(-1, hidden.shape[-1])[kept]


@dataclass
class _Chunks:
    """Positions that meet the vocabulary, and how one chunk of them is computed."""

    objective: Objective
    head: Head
    targets: Tensor
    weights: Tensor | None
    reference: tuple[Head, Tensor] | None
    entropy: bool
    gradient: bool

    def part(self, states: Tensor, start: int) -> Loss:
        """Return the loss of the positions from ``start`` on, whose hidden states are ``states``."""
        end = start + len(states)
        beside = None
        if self.reference is not None:
            with torch.no_grad():
                beside = self.reference[0](self.reference[1][start:end]).float()
        said = Predictions(self.head(states), self.targets[start:end], beside)
        losses = self.objective.losses(said)
        total = losses.sum() if self.weights is None else (losses * self.weights[start:end]).sum()
        return Loss(total, said.log_probability, said.entropy() if self.entropy else None)


class _GradientAtOnce(torch.autograd.Function):
    """Computes the chunks one after the other, each with its gradient where one is asked for, and keeps only the gradients."""

    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, states: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_states = torch.empty_like(states)
        of_parameters: list[Tensor | None] = [None] * len(parameters)
        totals, found, spread = [], [], []
        needed = chunks.gradient
        size = CHUNK_OF_TRAINED_HEAD if parameters else CHUNK
        for start in range(0, max(len(states), 1), size):
            part = states[start : start + size].detach().requires_grad_(states.requires_grad)
            inputs = [value for value in (part, *parameters) if value.requires_grad]
            with torch.set_grad_enabled(needed):
                loss = chunks.part(part, start)
            gradients = iter(torch.autograd.grad(loss.total, inputs) if needed else ())
            if needed and part.requires_grad:
                of_states[start : start + size] = next(gradients)
            for i, gradient in enumerate(gradients):
                known = of_parameters[i]
                of_parameters[i] = gradient if known is None else known.add_(gradient)
            totals.append(loss.total.detach())
            found.append(loss.log_probability.detach())
            spread.append(torch.empty(0, device=states.device) if loss.entropy is None else loss.entropy.detach())
        ctx.gradients = (of_states if needed and states.requires_grad else None, *of_parameters)
        results = torch.stack(totals).sum(), torch.cat(found), torch.cat(spread)
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept, ctx.gradients = ctx.gradients, ()
        return (None, *(None if value is None else value.mul_(gradients[0]) for value in kept))
