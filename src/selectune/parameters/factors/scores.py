"""Scores of weights: how much a single entry seems to matter. Written once; methods combine them.

Knows: every score by its name, its formula and what it needs; those that need passes of their own lie beside, one file each
(``flow.py``, ``shift.py``, ``inputs.py``). Does not know: what is done with a score.

A score is a function ``(context, targets, settings) -> {name: fp32 tensor of the weight's shape}``; higher means chosen sooner. All tensors
of a score lie on one device: the base's, but for what is drawn at random.
``w`` is a weight, ``g`` the gradient of the mean response loss over the examples, ``g_i`` that of one example.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from selectune.errors import UserError, nearest
from selectune.parameters.factors.gradients import each_gradient, gather
from selectune.parameters.factors.targets import Target

if TYPE_CHECKING:
    from selectune.meter import Meter
    from selectune.parameters.method import Context


@dataclass(frozen=True)
class Settings:
    """What scores may be set to."""

    examples: int = 64
    """Training records to score on, the first by hash of their content."""
    rank: int = 16
    """Of the low-rank approximation."""
    temperature: float = 200.0
    """Of the gradient that GraSP wants to keep flowing."""
    shift: float = 0.1
    """Share of a prompt's tokens that stands for another domain when exchanged, and weight of what changes then: exp(-shift)."""
    bits: int = 4
    """Of the rounding whose error is scored."""
    penalty: float = 0.1
    """Weight of what general text needs, in the dual importance."""
    step: float = 0.03
    """Learning rate of the one plain step that the dual importance imagines."""


Scores = dict[str, Tensor]
Score = Callable[["Context", Sequence[Target], Settings], Scores]
SCORES: dict[str, Score] = {}


def score(function: Score) -> Score:
    """Enter a score under its function's name."""
    SCORES[function.__name__] = function
    return function


def find(name: str) -> Score:
    """Return a score by name.

    Raises:
        UserError: there is none.
    """
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"selectune.parameters.factors.{module.name}")
    if name not in SCORES:
        raise UserError(f"unknown score '{name}'{nearest(name, SCORES)}", field="parameters.score",
                        expected=f"one of {', '.join(sorted(SCORES))}")  # fmt: skip
    return SCORES[name]


def scores_of(name: str, context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """Return a score by name of all entries of some targets; measured once for all choices that share what they measure.

    Raises:
        UserError: there is no such score.
    """
    function = find(name)
    return context.once((name, settings, tuple(target.name for target in targets)), lambda: function(context, targets, settings))


def weights_of(context: Context, targets: Iterable[Target]) -> Scores:
    """Return the base's weights in fp32."""
    values = dict(context.base.model.named_parameters())
    return {target.name: values[target.name].detach().float() for target in targets}


def _mean_gradient(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    names = [target.name for target in targets]
    return gather(context, names, ["mean"], examples=settings.examples)["mean"]


@score
def random(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """Uniform on (0, 1), by the run's seed."""
    return {target.name: torch.rand(target.shape, generator=context.generator) for target in targets}


@score
def magnitude(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """|w|."""
    return {name: weight.abs() for name, weight in weights_of(context, targets).items()}


@score
def small_magnitude(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """-|w|: the smallest first."""
    return {name: -weight.abs() for name, weight in weights_of(context, targets).items()}


@score
def low_rank_magnitude(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """|W_r|: the size of an entry in the best approximation of its matrix of rank r (exact singular values, fp32)."""
    return {name: low_rank(weight, settings.rank).abs() for name, weight in weights_of(context, targets).items()}


def low_rank(weight: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a matrix (or of each in a stack) of some rank."""
    if rank >= min(weight.shape[-2:]):
        return weight
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]


@score
def signed_gradient(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """g with its sign: for units whose entries are added up first."""
    return _mean_gradient(context, targets, settings)


@score
def gradient(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """|g|: the size of the mean gradient; examples that disagree cancel."""
    return {name: value.abs() for name, value in _mean_gradient(context, targets, settings).items()}


@score
def absolute_gradient(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """Mean of |g_i|: examples that disagree do not cancel."""
    names = [target.name for target in targets]
    return gather(context, names, ["absolute"], examples=settings.examples)["absolute"]


@score
def snip(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """|w g|: how much the loss changes, to first order, when the weight is set to 0 (SNIP)."""
    return {name: value.abs() for name, value in _products(context, targets, settings).items()}


@score
def force(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """-w g: the loss's *increase*, to first order, when the weight is set to 0; signed (skeletonization, FORCE)."""
    return {name: -value for name, value in _products(context, targets, settings).items()}


@score
def taylor(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """(w g)^2: the order of SNIP."""
    return {name: value.square() for name, value in _products(context, targets, settings).items()}


def _products(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    weights = weights_of(context, targets)
    return {name: weights[name] * value for name, value in _mean_gradient(context, targets, settings).items()}


@score
def fisher(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """Mean of g_i^2, g_i of the summed log-likelihood of one example's response: the empirical diagonal Fisher information."""
    names = [target.name for target in targets]
    return gather(context, names, ["squared"], examples=settings.examples, loss="sum")["squared"]


@score
def true_fisher(context: Context, targets: Sequence[Target], settings: Settings) -> Scores:
    """The same with responses drawn from the model: the diagonal Fisher information itself."""
    names = [target.name for target in targets]
    return gather(context, names, ["squared"], examples=settings.examples, loss="sum", labels="sampled")["squared"]


def fisher_diagonal(
    model: nn.Module,
    examples: list[tuple[Tensor, Tensor]],
    names: Iterable[str],
    labels: Literal["true", "sampled"] = "true",
    generator: torch.Generator | None = None,
    meter: Meter | None = None,
    bfloat16: bool = False,
    quiet: bool = True,
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information of some parameters at the model's present weights.

    ``F[p] = 1/N * sum over i of (d s_i / d p)^2``, elementwise, with ``s_i`` the *sum* of the log-probabilities of example
    i's response tokens. Each example has a backward pass of its own: squaring the gradient of a batch's mean would be
    another, biased quantity.

    Args:
        model: a causal model in evaluation mode. examples: pairs of ``input_ids`` and ``labels``, each ``(length,)`` int64.
        names: parameters to score. labels: ``"true"`` for the empirical Fisher, ``"sampled"`` for labels drawn from the model.

    Returns:
        name -> fp32 tensor of the parameter's shape, on its device.
    """
    wanted = set(names)
    total = {
        name: torch.zeros(value.shape, dtype=torch.float32, device=value.device)
        for name, value in model.named_parameters()
        if name in wanted
    }
    rows = [{"input_ids": ids, "labels": told, "position_ids": torch.arange(len(ids))} for ids, told in examples]

    def add(name: str, gradient: Tensor, tokens: int) -> None:
        total[name].addcmul_(gradient, gradient)

    each_gradient(model, rows, wanted, add, labels=labels, generator=generator, meter=meter, bfloat16=bfloat16, quiet=quiet)
    return {name: value / len(examples) for name, value in total.items()}


def block_norms(scores: Scores, blocks: Iterable[tuple[int, Iterable[str]]]) -> dict[int, float]:
    """Return, for each block, the sum over its tensors of the Frobenius norm of their scores."""
    return {index: sum(float(scores[name].norm()) for name in names if name in scores) for index, names in blocks}


def top(scores: dict[int, float], k: int, key: Callable[[float], float] = lambda score: -score) -> list[int]:
    """Return the k indices of the highest scores, ties broken by index, not-a-number last."""
    return sorted(sorted(scores, key=lambda index: (scores[index] != scores[index], key(scores[index]), index))[:k])
