"""How much memory training takes, told before it starts.

Knows: what training holds at once (weights, gradients, optimiser states, what a policy keeps, activations, logits, the frozen beginning), what
the machine has, and which key of the recipe to change when it does not fit. Everything is counted and nothing is timed: the same model,
records and recipe give the same bytes. Does not know: time, and what a step computes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields

import psutil
import torch
from torch import nn

from selectune.errors import UserError
from selectune.models.anatomy import Anatomy
from selectune.models.head import SplitModel
from selectune.objectives.objective import CHUNK
from selectune.recipe import BudgetRecipe, TrainingRecipe
from selectune.training.policies.policy import Policy
from selectune.training.saved import by_kind, saved_bytes
from selectune.training.steps import remembers, rows_remembered
from selectune.training.trainable import Trainable

GIB = 1 << 30
PROCESS = 850 << 20
"""The interpreter and the libraries, with what they keep between steps."""
STATES = {"adamw": 8.0, "adamw_8bit": 2.0, "adafactor": 0.1, "lion": 4.0, "lion_8bit": 1.0, "sgd": 0.0}
"""Bytes that an optimiser keeps for each trained weight."""
LOGITS = 8
"""Bytes for each logit of a chunk: logits and gradients in bf16, and as much for the head's weight laid out anew in the products."""
HEAP = 1.25
"""Memory that activations take for each byte of them: what is freed between larger tensors lies idle."""
LORA_RANK = 16
AUTO_TOKENS = 1024
"""Tokens in a forward pass beyond which a larger one gains nothing on a CPU: half of them fill the matrix units of two cores."""
AUTO_SHARE = 0.5
"""Of the machine's memory, what ``micro_batch_sequences: auto`` may plan with when the budget names no other."""


@dataclass(frozen=True)
class Memory:
    """Bytes held at the peak of training, by what they hold."""

    process: int
    weights: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    prefix: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Footprint:
    """What training would hold, and how that changes with the recipe. Bytes, but for the counts."""

    trained: int
    """Weights that train."""
    held: int
    """Those that have gradients and optimiser states at once."""
    adapter: int
    """Weights that would train as LoRA of rank 16."""
    weights: int
    frozen_weights: int
    """Of the base, if nothing of it trained."""
    fixed: int
    """Activations that do not grow with the batch: copies of trained weights in the dtype of the computation."""
    sequence: int
    """Activations of one packed sequence."""
    recomputed: int
    """The same with gradient checkpointing."""
    logits: int
    prefix: int
    length: int
    """Tokens in a packed sequence."""
    saved_by: dict[str, int]
    """``sequence`` by the kind of module that keeps it."""
    copies: int = 1
    """Of what trains, in fp32: the gradients, and what a policy holds beside them."""

    @classmethod
    def of(cls, made: Trainable, recipe: TrainingRecipe) -> Footprint:
        """Count it: one forward pass over one packed sequence and one over two, in which saved tensors are noted."""
        model, rows, bfloat16 = made.model, made.train_rows, made.bfloat16
        reference = made.objective.needs_reference or made.policy.keeps_base
        split = SplitModel(model)
        anatomy = Anatomy.of(split.causal)
        own = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in model.parameters()}
        trained = [value for value in model.parameters() if value.requires_grad]
        frozen = anatomy.total_parameters * (2 if bfloat16 else 4)
        longest = [max(rows, key=lambda row: int(row["position_ids"].max()))] * 2
        first, both = (saved_bytes(split, rows, longest[:count], bfloat16) for count in (1, 2))
        one, two = first.total(), both.total()
        length, config = len(longest[0]["input_ids"]), split.causal.config.get_text_config()
        targets = max(int((row["labels"] != -100).sum()) for row in rows)
        state = length * config.hidden_size * 4
        blocks = len(anatomy.blocks)
        linears = [split.causal.get_submodule(name).weight.shape for block in anatomy.blocks for name in block.linears]
        sequences = len(rows) + len(made.dev_rows)
        kept = rows_remembered(model, sequences, length)[1] if remembers(model, recipe, made.lengths) else 0
        return cls(
            trained=sum(value.numel() for value in trained),
            held=held_at_once(model, made.policy),
            adapter=sum(LORA_RANK * (shape[0] + shape[-1]) for shape in linears),
            weights=sum(own.values()) + (frozen if reference and not hasattr(model, "disable_adapter") else 0),
            frozen_weights=frozen,
            fixed=max(2 * one - two, 0),
            sequence=two - one,
            recomputed=blocks * state + (two - one) // blocks,
            logits=LOGITS * min(CHUNK, max(targets, 1) * 2) * config.vocab_size,
            prefix=kept,
            length=length,
            saved_by=by_kind(both - first),
            copies=made.policy.copies,
        )

    def at(
        self, recipe: TrainingRecipe, micro: int, *, optimiser: str | None = None, checkpointing: bool | None = None,
        length: int | None = None, adapter: bool = False,
    ) -> Memory:  # fmt: skip
        """Return what training holds with a recipe, or with one in which some keys are changed.

        Args:
            micro: packed sequences in a forward pass. length: ``data.max_length``. adapter: LoRA instead of the form at hand.
        """
        recomputed = recipe.gradient_checkpointing if checkpointing is None else checkpointing
        share = (length or self.length) / self.length
        each = self.recomputed if recomputed else self.sequence
        gradients, states = gradients_and_states(self.adapter if adapter else self.held, self.copies, recipe, optimiser)
        return Memory(
            process=PROCESS,
            weights=self.frozen_weights + 4 * self.adapter if adapter else self.weights,
            gradients=gradients,
            optimiser=states,
            activations=round(HEAP * ((0 if adapter else self.fixed) + micro * each * share)),
            logits=self.logits,
            prefix=0 if recomputed or adapter else self.prefix,
        )

    def smaller(self, recipe: TrainingRecipe, micro: int) -> Iterator[tuple[str, Memory]]:
        """Yield what could be changed, the least painful first, with what training would then hold."""
        for fewer in sorted((n for n in divisors(recipe.batch_sequences) if n < micro), reverse=True):
            yield f"training.micro_batch_sequences: {fewer}", self.at(recipe, fewer)
        if not recipe.gradient_checkpointing:
            yield "training.gradient_checkpointing: true", self.at(recipe, micro, checkpointing=True)
        if recipe.optimiser == "adamw":
            yield "training.optimiser: adamw_8bit", self.at(recipe, micro, optimiser="adamw_8bit")
        length = self.length // 2
        while length >= 64:
            yield f"data.max_length: {length}", self.at(recipe, micro, length=length)
            length //= 2
        if self.adapter < self.trained:
            yield "form: lora", self.at(recipe, micro, adapter=True)
        both = "training.gradient_checkpointing: true and training.micro_batch_sequences: 1"
        yield both, self.at(recipe, 1, checkpointing=True)
        if self.adapter < self.trained:
            yield f"form: lora, {both}", self.at(recipe, 1, checkpointing=True, adapter=True)


def held_at_once(model: nn.Module, policy: Policy) -> int:
    """Return of how many trained weights gradients and optimiser states are held at once."""
    found, anatomy = Counter[int | None](), Anatomy.of(SplitModel(model).causal)
    for name, value in model.named_parameters():
        if value.requires_grad:
            found[anatomy.block_of(name)] += value.numel()
    return policy.at_once(found)


def gradients_and_states(held: int, copies: int, recipe: TrainingRecipe, optimiser: str | None = None) -> tuple[int, int]:
    """Return the bytes of gradients, with what a policy holds beside them, and of an optimiser's states (left out: the recipe's).

    Args:
        held: weights that have them at once. copies: see :attr:`Policy.copies`.
    """
    return 0 if recipe.step_in_backward else 4 * copies * held, round(STATES[optimiser or recipe.optimiser] * held)


def divisors(batch: int) -> list[int]:
    """Return the powers of two that divide a batch."""
    return [1 << power for power in range(batch.bit_length()) if batch % (1 << power) == 0]


def micro_batch(footprint: Footprint, recipe: TrainingRecipe, budget: BudgetRecipe) -> int:
    """Return the packed sequences of one forward pass; for ``auto``, the same on every run of a recipe on a machine.

    The largest power of two that divides the batch, has at most ``AUTO_TOKENS`` tokens (any number on an accelerator) and fits the
    memory of the budget or half of the machine's.
    """
    if recipe.micro_batch_sequences != "auto":
        return recipe.micro_batch_sequences
    limit = budget.memory_gib * GIB if budget.memory_gib else AUTO_SHARE * _total()
    tokens = AUTO_TOKENS if not torch.cuda.is_available() else float("inf")
    fits = [
        count
        for count in divisors(max(1, recipe.batch_sequences // recipe.processes))
        if count * footprint.length <= tokens and footprint.at(recipe, count).total <= limit
    ]
    return max(fits, default=1)


def memory_limit(budget: BudgetRecipe) -> int:
    """Return the bytes that training may hold: the budget's, or what the machine has for this process."""
    if budget.memory_gib:
        return round(budget.memory_gib * GIB)
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def memory_problem(
    footprint: Footprint, recipe: TrainingRecipe, budget: BudgetRecipe, micro: int, needed: int = 0
) -> UserError | None:
    """Return the refusal of a run that needs more memory than it may have, with what would fit.

    Args:
        needed: measured bytes, where they were measured; the count is scaled to them.
    """
    limit, counted = memory_limit(budget), footprint.at(recipe, micro).total
    scale = needed / counted if needed else 1.0
    if counted * scale <= limit:
        return None
    fits = next((change for change in footprint.smaller(recipe, micro) if change[1].total * scale <= limit), None)
    smaller = (
        f"set {fits[0]} (about {fits[1].total * scale / GIB:.2f} GiB)"
        if fits
        else "take a smaller base; no setting of this one fits"
    )
    raised = f", or budget.memory_gib: {math.ceil(counted * scale / GIB * 10) / 10:g}" if budget.memory_gib else ""
    whose = "the budget is" if budget.memory_gib else "this machine has"
    return UserError(
        f"training needs about {counted * scale / GIB:.2f} GiB of memory and {whose} {limit / GIB:.2f} GiB",
        field="budget.memory_gib",
        mend=smaller + raised,
    )


def _total() -> int:
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else psutil.virtual_memory().total
