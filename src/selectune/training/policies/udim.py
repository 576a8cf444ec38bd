"""Flat minima that stay so on inputs nobody has seen (UDIM): sharpness-aware steps, and a penalty on what changes at the worst nearby inputs.

Token embeddings are moved uphill, record by record, by the gradient of the loss at the worst nearby weights, which the sharpness-aware step computes
anyway. The penalty compares how the gradients of single records spread there with how they spread on the inputs as they are; of a record's
gradient it looks at that of a factor on each feature of the last hidden state, for which no second backward pass through the model is needed.
Knows: the move, the gradients of records, the penalty and its gradient. Does not know: the step uphill in the weights (``sharpness.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from selectune.data.packing import record_spans
from selectune.objectives.objective import CHUNK
from selectune.training.policies.policy import Batch, Stage, last_states
from selectune.training.policies.sharpness import Sharpness


class UnknownDomains(Sharpness):
    """Sharpness-aware minimisation, and gradients that spread on moved inputs as they do on the inputs themselves."""

    name: ClassVar[str] = "udim"
    paper: ClassVar[str] = (
        "Unknown Domain Inconsistency Minimization for Domain Generalization, ICLR 2024, arXiv 2403.07329; code: aailabkaist/UDIM"
    )
    summary: ClassVar[str] = (
        "SAM, and a penalty on records whose gradients change at the worst nearby inputs (UDIM): four passes a step."
    )
    departs: ClassVar[str] = (
        "Token embeddings are moved instead of pixels, along the gradient of the loss at the worst nearby weights, to first order in the radius "
        "that of the code's loss and gradient norm; each record's direction is normalised by itself, not along the batch. Gradients of records "
        "are those of a factor on each feature of the last hidden state, not of the whole head, and are compared within a forward pass. The "
        "penalty is of cross-entropy, whatever the objective."
    )
    changes_what_trains: ClassVar[bool] = True

    radius: Annotated[float, Field(gt=0)] = 0.02
    """Length of the step uphill in the weights, over all that trains."""
    inconsistency: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the penalty; 0: SAM."""
    distance: Annotated[float, Field(ge=0)] = 0.05
    """How far the tokens of a record are moved on average (root mean square), in mean lengths of an embedding."""
    start: Annotated[float, Field(ge=0, le=1)] = 1 / 3
    """Share of the run, at its beginning, without the penalty."""

    def before_step(self, stage: Stage) -> None:
        super().before_step(stage)
        stage.passing["batches"] = []

    def loss(self, stage: Stage, batch: Batch, plain: Callable[[], Tensor]) -> Tensor:
        stage.passing["batches"].append({key: value for key, value in batch.items() if key != "row"})
        return super().loss(stage, batch, plain)

    def gradients(self, stage: Stage) -> None:
        batches = stage.passing.pop("batches")
        if not self.inconsistency or stage.step < self.start * stage.steps:
            super().gradients(stage)
            return
        with _embedded(stage) as found:
            super().gradients(stage)
        kept = {name: gradient for name, _, gradient in stage.gradients()}
        stage.clear()
        with torch.enable_grad():
            for batch, states in zip(batches, found, strict=False):  # none were found where there was no way uphill
                penalise(stage, batch, self.shift(batch, states), self.inconsistency / len(batches))
        for name, gradient in kept.items():
            added = stage.parameters[name].grad
            stage.parameters[name].grad = gradient if added is None else gradient + stage.mean(added)

    def shift(self, batch: Batch, embedded: Tensor) -> Tensor:
        """Return how each token's embedding is moved, ``(sequences, length, hidden)`` fp32.

        Args:
            embedded: the embeddings, with the gradient of the loss at the worst nearby weights.
        """
        assert embedded.grad is not None
        slope = embedded.grad.float().flatten(0, 1)
        moved = torch.zeros_like(slope)
        length = self.distance * embedded.detach().float().norm(dim=-1).mean()
        for start, end in record_spans(batch["position_ids"], batch["labels"]):
            direction = slope[start:end]
            moved[start:end] = direction * (length * (end - start) ** 0.5 / direction.norm().clamp(min=1e-30))
        return moved.view(embedded.shape)


@contextmanager
def _embedded(stage: Stage) -> Iterator[list[Tensor]]:
    """Within, what comes out of the token embeddings is kept for each pass, with its gradient."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        states = output if output.requires_grad else output.detach().requires_grad_(True)
        states.retain_grad()
        found.append(states)
        return states

    handle = stage.whole.causal.get_input_embeddings().register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def penalise(stage: Stage, batch: Batch, shift: Tensor, weight: float) -> None:
    """Add the gradient of the penalty on a batch, times a weight, to what trains.

    Args:
        shift: of the embeddings, ``(sequences, length, hidden)``.
    """
    twice = {key: torch.cat([value, value]) for key, value in batch.items()}
    embeddings = stage.whole.causal.get_input_embeddings()
    moved = torch.cat([torch.zeros_like(shift), shift])
    handle = embeddings.register_forward_hook(lambda module, inputs, output: output + moved.to(output.dtype))
    try:
        with last_states(stage.whole) as found:
            # nothing meets the vocabulary
            stage.whole(**(twice | {"weights": torch.zeros_like(twice["labels"], dtype=torch.float32)}))
    finally:
        handle.remove()
    stage.meter.count(forward=twice["input_ids"].numel(), backward=twice["input_ids"].numel())
    records = Records(stage, found[-1], twice["position_ids"], twice["labels"])
    gradients = records.gradients().requires_grad_(True)
    (slopes,) = torch.autograd.grad(weight * inconsistency(gradients), gradients)
    records.backward(slopes)


def inconsistency(gradients: Tensor) -> Tensor:
    """Return how unlike the gradients of moved records spread, and how large they are.

    Args:
        gradients: ``(2 x records, features)`` fp32, those of the records as they are first, then those of the moved ones in the same order.
    """
    own, moved = gradients.chunk(2)
    middle = own.mean(0)
    spread = [(part - middle).square().mean(0) for part in (own, moved)]
    between = (spread[0] + spread[1]) / 2
    unlike: Tensor = sum((part - between).square().mean() for part in spread) / 2  # type: ignore[assignment]
    return unlike + moved.square().mean()


class Records:
    """The gradients of single records' mean losses, as functions of the last hidden states, a few positions at a time.

    A factor ``s`` on each feature, 1 where nothing is changed, has the gradient: sum over a record's positions of ``hidden * dL/dhidden``.

    Args:
        hidden: ``(sequences, length, hidden)`` with its graph. position_ids, labels: ``(sequences, length)`` int64.
    """

    def __init__(self, stage: Stage, hidden: Tensor, position_ids: Tensor, labels: Tensor) -> None:
        self.stage, self.hidden = stage, hidden
        number = torch.zeros(labels.numel(), dtype=torch.int64, device=labels.device)
        spans = record_spans(position_ids, labels)
        for place, (start, end) in enumerate(spans):
            number[start:end] = place
        wanted = labels[:, 1:].reshape(-1)
        self.kept = (wanted != -100).nonzero().squeeze(-1)
        self.targets, self.record = wanted[self.kept], number.view_as(labels)[:, 1:].reshape(-1)[self.kept]
        self.tokens = torch.bincount(self.record, minlength=len(spans)).clamp(min=1)

    def gradients(self) -> Tensor:
        """Return them, ``(records, features)`` fp32, without a graph."""
        with torch.no_grad():
            states = self._states()
        found = states.new_zeros(len(self.tokens), states.shape[-1], dtype=torch.float32)
        for some in torch.arange(len(states), device=states.device).split(CHUNK):
            part = states[some].detach().requires_grad_(True)
            found.index_add_(0, self.record[some], self._of_positions(part, some, graph=False).detach())
        return found

    def backward(self, slopes: Tensor) -> None:
        """Go backward from the sum of ``slopes * gradients``, to whatever trains in the head and below it.

        Args:
            slopes: ``(records, features)`` fp32.
        """
        states = self._states()
        leaf = states.detach().requires_grad_(True)
        for some in torch.arange(len(states), device=states.device).split(CHUNK):
            (self._of_positions(leaf[some], some, graph=True) * slopes[self.record[some]]).sum().backward()
        if states.requires_grad and leaf.grad is not None:
            states.backward(leaf.grad)

    def _states(self) -> Tensor:
        return self.hidden[:, :-1].reshape(-1, self.hidden.shape[-1])[self.kept]

    def _of_positions(self, states: Tensor, some: Tensor, graph: bool) -> Tensor:
        """Return what some positions add to their records' gradients, ``(positions, features)`` fp32."""
        with self.stage.autocast():
            logits = self.stage.whole.split.logits(states).float()
        losses = nn.functional.cross_entropy(logits, self.targets[some], reduction="none")
        mean = (losses / self.tokens[self.record[some]]).sum()
        (slope,) = torch.autograd.grad(mean, states, create_graph=graph)
        return states.float() * slope.float()
