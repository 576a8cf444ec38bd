"""What every policy has in common, and what it is given.

Knows: the moments of an optimiser step at which a policy may act, what it may use there (``Stage``), and how what it remembers is kept in
checkpoints. Does not know: any policy, or how a step is run.

A policy is a frozen set of hyper-parameters; whatever changes during a run lies in the stage. Random draws come from the run's seed and the
step's number, so several processes, and a resumed run, draw the same.
"""

from __future__ import annotations

import zlib
from abc import ABC
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from selectune.catalogue import Method
from selectune.models import Anatomy
from selectune.parameters.selection import Part, Selection
from selectune.training import processes
from selectune.training.partial import ENTRIES, parts

if TYPE_CHECKING:
    from selectune.data import Record
    from selectune.meter import Meter
    from selectune.parameters import Context
    from selectune.recipe import TrainingRecipe
    from selectune.training.loss import LossOfModel

Batch = dict[str, Tensor]


class Stage:
    """What a policy may use and change while a model trains.

    Args:
        whole: the model with its loss. seed: the run's. steps: optimiser steps in the run. meter: what counts the cost.
        rows: the packed training sequences. context: base, encoder and records, for policies that choose anew.
        batch_sequences: sequences in a batch.
    """

    def __init__(
        self, whole: LossOfModel, seed: int, steps: int, meter: Meter, rows: list[Batch], context: Context | None = None,
        batch_sequences: int = 1,
    ) -> None:  # fmt: skip
        self.whole, self.seed, self.steps, self.meter, self.rows, self.context = whole, seed, steps, meter, rows, context
        self.batch_sequences = batch_sequences
        self.anatomy = Anatomy.of(whole.causal)
        self.optimiser: Any = None
        self.step = 0
        """Optimiser steps made."""
        self.epoch = 0
        """Epochs made."""
        self.learning_rate = 0.0
        """Of the step that comes, or is being made."""
        self.tokens: Any = 1
        """Response tokens in the batch of a step, of all its micro-batches (divided by the number of processes)."""
        self.decays: Callable[[], set[str]] = set
        """Names, in the trained module, of the parameters that weight decay is meant for."""
        self.tensors: dict[str, Tensor] = {}
        """What a policy remembers, kept in checkpoints."""
        self.numbers: dict[str, Any] = {}
        """Likewise, anything that JSON can hold."""
        self.passing: dict[str, Any] = {}
        """What is made at the beginning, or within one step; kept nowhere."""
        self._attention = whole.causal.config.get_text_config()._attn_implementation
        self.look()

    def look(self) -> None:
        """Find what trains, anew.

        ``parameters``: by the name of the weight of the base that they are or belong to (of an adapter, its own name), whole tensors
        and entries of parts alike, fp32. ``parts``: of the weights of which only some entries train, which.
        """
        self.parameters: dict[str, nn.Parameter] = {
            name.removeprefix("base_model.model.").replace(ENTRIES, ""): value
            for name, value in self.whole.model.named_parameters()
            if value.requires_grad
        }
        found = parts(self.whole.model)
        self.parts: dict[str, Part] = {name.removeprefix("base_model.model."): part for name, part in found.items()}

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.whole.parameters()).device

    def generator(self, purpose: str = "") -> torch.Generator:
        """Return a source of random numbers on the CPU: the same for the same run, purpose and step, in every process."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{self.step}/{purpose}".encode()))

    def gradients(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Return name, parameter and gradient of all that has one."""
        for name, value in self.parameters.items():
            if value.grad is not None:
                yield name, value, value.grad

    def sample(self, count: int, purpose: str = "") -> list[Batch]:
        """Return training sequences as batches of one, drawn anew for each step and purpose; all of them, where there are no more."""
        order = torch.randperm(len(self.rows), generator=self.generator(f"rows/{purpose}"))[:count].tolist()
        return [{key: value[None].to(self.device) for key, value in self.rows[number].items()} for number in order]

    def mean_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch's response tokens, outside of the step that is being made."""
        self.meter.count(forward=batch["input_ids"].numel(), backward=batch["input_ids"].numel() * torch.is_grad_enabled())
        total: Tensor = self.whole(**batch)
        return total / (batch["labels"][:, 1:] != -100).sum().clamp(min=1)

    def states(self, batch: Batch) -> Tensor:
        """Return the last hidden states of a batch, ``(sequences, length, hidden size)``; no loss is made."""
        self.meter.count(forward=batch["input_ids"].numel(), backward=batch["input_ids"].numel() * torch.is_grad_enabled())
        return self.whole.states(**batch)

    def gradient(self, batch: Batch, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return the gradient of :meth:`mean_loss` by name, of some or of all that trains; those of the step stay as they are."""
        with torch.enable_grad():
            values = {n: v for n, v in self.parameters.items() if v.requires_grad and (names is None or n in names)}
            found = torch.autograd.grad(self.mean_loss(batch), list(values.values()), allow_unused=True)
        return {name: gradient for name, gradient in zip(values, found, strict=True) if gradient is not None}

    def autocast(self) -> Any:
        """Return the precision that the model computes in, as a context."""
        return self.whole.autocast()

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """Within, the model attends as it does outside of training, for passes that know nothing of packed records."""
        config = self.whole.causal.config.get_text_config()
        during = config._attn_implementation
        config._attn_implementation = self._attention
        try:
            yield
        finally:
            config._attn_implementation = during

    def values(self) -> dict[str, Tensor]:
        """Return copies of what trains as it is now."""
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def taken(self, name: str, whole: Tensor) -> Tensor:
        """Return, of a tensor of a weight's shape, what belongs to the entries that train."""
        return self.parts[name].take(whole) if name in self.parts else whole

    def block(self, name: str) -> int | None:
        """Return the number of the block that a parameter lies in; None outside of blocks."""
        return self.anatomy.block_of(name)

    def train_only(self, names: set[str] | None = None) -> None:
        """Let nothing else have a gradient until this is called again; all that trains, when left out.

        Of several processes, gradients are added up for all that trains, and are then left out by :meth:`drop`.
        """
        if processes.count() == 1:
            for name, value in self.parameters.items():
                value.requires_grad_(names is None or name in names)

    def clear(self) -> None:
        """Forget all gradients."""
        self.drop(set(self.parameters))

    def drop(self, names: set[str]) -> None:
        """Forget gradients: the optimiser passes over these parameters."""
        for name in names:
            self.parameters[name].grad = None

    def forget(self, names: set[str]) -> None:
        """Drop the optimiser's state of some parameters."""
        for name in names:
            self.optimiser.state.pop(self.parameters[name], None)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes."""
        if processes.count() == 1:
            return value
        from accelerate.utils import reduce

        found: Tensor = reduce(value.to(self.device, copy=True), "mean")  # type: ignore[assignment]
        return found.to(value.device)


@contextmanager
def last_states(whole: LossOfModel) -> Iterator[list[Tensor]]:
    """Within, the decoder's last hidden states are kept, ``(sequences, length, hidden size)`` for each pass."""
    found: list[Tensor] = []
    handle = whole.split.decoder.register_forward_hook(lambda module, inputs, output: found.append(output.last_hidden_state))
    try:
        yield found
    finally:
        handle.remove()


class Policy(Method, ABC):
    """An answer to: what acts while the model trains? Every hook may be left as it is."""

    axis: ClassVar[str] = "policies"
    acts: ClassVar[bool] = True
    """Whether gradients or updates are looked at: a parameter can then not step, and its gradient be freed, in the backward pass."""
    copies: ClassVar[int] = 1
    """Of what trains, in fp32, that are held at once beside the weights and the optimiser's states: the gradients are one."""
    keeps_base: ClassVar[bool] = False
    """Whether a copy of the base is held."""
    own_gradients: ClassVar[bool] = False
    """Whether the policy makes the gradients, or the whole update, itself; losses are then asked for without a graph."""
    changes_what_trains: ClassVar[bool] = False
    """Whether what trains, or what goes into the blocks, changes: nothing can then be remembered of the frozen beginning."""
    remembers_on_cpu: ClassVar[bool] = False
    """Whether what a checkpoint holds of it lies on the CPU, not with the model."""
    keeps_last: ClassVar[bool] = False
    """Whether the method is done at the end of the run alone: it then ends with the last checkpoint, not with the best."""

    def for_run(self, parameters: str | dict[str, Any]) -> Policy:
        """Return the policy for a run that chooses its parameters by this method."""
        return self

    def records(self, context: Context, clean: Callable[[list[Record]], list[Record]]) -> list[Record]:
        """Return records to train on beside those of the run.

        Args:
            clean: leaves out records that overlap with what the run is measured by, where its recipe asks for that.
        """
        return []

    def settings(self, recipe: TrainingRecipe) -> TrainingRecipe:
        """Return how training has to run with this policy."""
        off = {"step_in_backward": self.acts, "prefix_cache": self.changes_what_trains, "keep_best": self.keeps_last}
        return recipe.model_copy(update={setting: False for setting, asked in off.items() if asked})

    def at_once(self, weights: Mapping[int | None, int]) -> int:
        """Return of how many weights gradients and optimiser states are held at once, at most.

        Args:
            weights: how many train in each block; under None outside of blocks.
        """
        return sum(weights.values())

    def begin(self, stage: Stage) -> None:
        """Act before the first step; the weights are the base's, there is no optimiser yet. Also when a run is taken up again."""

    def before_step(self, stage: Stage) -> None:
        """Act before the first forward pass of a step."""

    def loss(self, stage: Stage, batch: Batch, plain: Callable[..., Tensor]) -> Tensor:
        """Return the loss of one micro-batch, its share of the batch's mean over response tokens, with its graph.

        Args:
            batch: ``input_ids``, ``labels`` and ``position_ids``, each ``(sequences, length)``. plain: computes the usual loss, as often
                as it is called; of another batch, where one is given.
        """
        return plain()

    def gradients(self, stage: Stage) -> None:
        """Act on the gradients of a whole batch, before they are clipped."""

    def after_step(self, stage: Stage) -> None:
        """Act after the optimiser has stepped; the gradients are still there."""

    def done(self, stage: Stage) -> bool:
        """Whether training may end; asked after each epoch."""
        return False

    def state(self, stage: Stage) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint has to hold beside the weights that train and the optimiser's state."""
        return stage.tensors, stage.numbers

    def restore(self, stage: Stage, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Take up what :meth:`state` returned, read from a file; weights and optimiser are restored afterwards."""
        place = torch.device("cpu") if self.remembers_on_cpu else stage.device
        stage.tensors, stage.numbers = {name: value.to(place) for name, value in tensors.items()}, numbers

    def touched(self, stage: Stage) -> Selection | None:
        """Return which weights may have changed, where these are others than those that were chosen at first."""
        return None
