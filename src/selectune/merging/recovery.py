"""A few weights of a specialist go back to the base's values, so that prompts of another kind mean again what they meant.

The direction of a set of prompts is the mean hidden state of their last tokens behind some block. Weights below that block whose return
brings the specialist's direction nearer to the base's (the sign of the gradient says so, its size ranks them) return, some in each step.
Where the specialist then does worse at its own task, each step also gives a share of these weights back: those whose value the task's
own direction asks for most.
Knows: directions, the choice of weights, the rollback and the search among checkpoints; what the prompts are where a recipe names it
(``finish: recovery``). Does not know: how the specialist was trained.

Source: *Alleviating the Fear of Losing Alignment in LLM Fine-tuning*, IEEE S&P 2025, arXiv 2504.09757; there the prompts are harmful ones, here any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from selectune.errors import UserError
from selectune.merging.method import Finish
from selectune.models.anatomy import Anatomy, within_context
from selectune.models.head import SplitModel
from selectune.progress import watched

if TYPE_CHECKING:
    from selectune.parameters.method import Context

Prompts = Sequence[Sequence[int]]


class Recovery(Finish):
    """What general prompts hang on goes back."""

    name: ClassVar[str] = "recovery"
    paper: ClassVar[str] = "Alleviating the Fear of Losing Alignment in LLM Fine-tuning, IEEE S&P 2025, arXiv 2504.09757"
    summary: ClassVar[str] = (
        "Weights whose return brings general prompts back to where the base had them return, while the target hardly suffers."
    )
    departs: ClassVar[str] = (
        "The prompts are general ones (built in) instead of harmful ones, and the task's measure is the loss of the development records' "
        "responses. Prompts are passed one by one, so that nothing is padded. The number of weights that may return in a step is met, ties by "
        "place; the paper's code leaves out the last of them and its equals."
    )

    block: Annotated[int, Field(gt=0)] | None = None
    """Blocks before it may change, and the direction is looked at where it begins; left out: at two thirds of the depth."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.002
    """Of the weights of all blocks, the share that may return in a step."""
    steps: Annotated[int, Field(gt=0)] = 20
    """Steps at most."""
    warm_up: Annotated[int, Field(gt=0)] = 5
    """Steps before the task is first measured."""
    every: Annotated[int, Field(gt=0)] = 5
    """Steps between checkpoints."""
    tolerance: Annotated[float, Field(ge=0)] = 0.05
    """Largest rise of the development loss, relative to the specialist's."""
    rollback: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Of the weights that returned in a step, the share that is given back, where the task suffers."""
    examples: Annotated[int, Field(gt=0)] = 256
    """Prompts of each kind, at most."""
    batch: Annotated[int, Field(gt=0)] = 8
    """Prompts whose mean state is compared."""

    def place(self, blocks: int) -> int:
        """Return ``block`` in a base of so many blocks."""
        return self.block or max(round(blocks * 2 / 3), 1)

    def finish(self, model: Any, context: Context) -> dict[str, Any]:
        from selectune.parameters.factors.trial import loss_on

        general, own = (
            [context.encoder.prompt_ids(one.prompt) for one in records[: self.examples] if one.messages]
            for records in (context.general, context.train)
        )
        if not own:
            raise UserError(
                "recovery needs prompts: these records are raw text", field="finish", expected="questions with answers"
            )
        held_out = context.dev or context.train[: self.examples]
        done = recover(model, context.base.model, general, own, lambda one: -loss_on(context, held_out, one), self, context.quiet)
        return {
            "weights returned": done.returned, "steps": done.steps, "rolled back": "yes" if done.rolled_back else "no",
            "similarity to the base, first and last step": [round(done.similarities[0], 4), round(done.similarities[-1], 4)],
        }  # fmt: skip


@dataclass
class Recovered:
    """What came of it."""

    steps: int
    """Steps whose weights were kept; 0: nothing returned."""
    rolled_back: bool
    returned: int
    """Weights that are the base's again."""
    similarities: list[float] = field(default_factory=list)
    """Cosine of the specialist's and the base's direction before each step, of the phase that was kept."""
    measures: list[float] = field(default_factory=list)
    """The task's measure at each checkpoint of that phase."""


def recover(
    model: Any, base: Any, probes: Prompts, task: Prompts, measure: Callable[[Any], float], settings: Recovery, quiet: bool = True
) -> Recovered:
    """Let weights of a specialist return to the base's values, in place.

    Args:
        model, base: plain causal models of one kind, fp32. probes: prompts on which the base is to be met again. task: prompts of the specialist's
            own task. measure: of the task, higher is better. quiet: show no progress.

    Raises:
        UserError: the block is not there.
    """
    anatomy = Anatomy.of(model)
    block = settings.place(len(anatomy.blocks))
    if not 0 < block < len(anatomy.blocks):
        raise UserError(f"there is no block {block} to look behind", field="block", expected=f"1 to {len(anatomy.blocks) - 1}")
    eligible = [n for b in anatomy.blocks[:block] for n in b.parameters if n not in b.norms]
    originals, values = dict(base.named_parameters()), dict(model.named_parameters())
    tuned = {name: values[name].detach().clone() for name in eligible}
    start = measure(model)
    floor = start - settings.tolerance * abs(start)
    wanted, own = direction(base, probes, settings), direction(model, task, settings)
    count = math.ceil(settings.rate * sum(anatomy.sizes[name] for block in anatomy.blocks for name in block.parameters))

    def phase(rolls_back: bool) -> tuple[Recovered, dict[str, Tensor]] | None:
        """Steps from the specialist on, until its task suffers; None where it does after the warm-up already."""
        _put(values, tuned)
        done, good = Recovered(0, rolls_back, 0), tuned
        gradient: dict[str, Tensor] = {}
        shown = "Recovering, and giving back what the task needs" if rolls_back else "Recovering"
        for step in watched(range(1, settings.steps + 1), shown, quiet):
            found, similarity = gradients(model, probes, wanted, eligible, settings)
            done.similarities.append(similarity)
            gradient = {name: gradient[name] + value for name, value in found.items()} if gradient and not rolls_back else found
            returned = candidates({name: values[name].detach() for name in eligible}, originals, gradient, count)
            for name, mask in returned.items():
                values[name].data[mask] = originals[name].data[mask]
            if rolls_back:
                _give_back(values, tuned, returned, gradients(model, task, own, eligible, settings)[0], settings.rollback)
            if step == settings.warm_up and not rolls_back and measure(model) <= floor:
                return None
            if step % settings.every == 0 or step == settings.steps:
                done.measures.append(measure(model))
                if done.measures[-1] <= floor:
                    break
                done.steps, good = step, {name: values[name].detach().clone() for name in eligible}
        return done, good

    done, good = phase(False) or phase(True)  # type: ignore[misc]
    _put(values, good)
    done.returned = sum(int(((good[name] != tuned[name]) & (good[name] == originals[name])).sum()) for name in eligible)
    return done


def candidates(
    values: dict[str, Tensor], originals: dict[str, Any], gradient: dict[str, Tensor], count: int
) -> dict[str, Tensor]:
    """Return masks of the weights that return: the ``count`` largest gradients of those whose return lowers the loss; ties by place."""
    scores = {}
    for name, value in values.items():
        helps = (value - originals[name].detach()).sign() * gradient[name].sign() > 0
        scores[name] = gradient[name].abs() * helps
    return _largest(scores, count)


def _largest(scores: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    from selectune.parameters.factors.allocation import is_best

    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    chosen = is_best(flat, min(count, int((flat > 0).sum())))
    pieces = chosen.split([score.numel() for score in scores.values()])
    return {name: piece.view(score.shape) for (name, score), piece in zip(scores.items(), pieces, strict=True)}


def _give_back(
    values: dict[str, nn.Parameter],
    tuned: dict[str, Tensor],
    returned: dict[str, Tensor],
    gradient: dict[str, Tensor],
    share: float,
) -> None:
    scores = {}
    for name, mask in returned.items():
        helps = (values[name].detach() - tuned[name]).sign() * gradient[name].sign() > 0
        scores[name] = gradient[name].abs() * helps * mask
    there = sum(int((score > 0).sum()) for score in scores.values())
    for name, mask in _largest(scores, int(share * there)).items():
        values[name].data[mask] = tuned[name][mask]


@torch.no_grad()
def direction(model: Any, prompts: Prompts, settings: Recovery) -> Tensor:
    """Return the mean hidden state of the prompts' last tokens behind the blocks before ``settings.block``, ``(hidden,)``."""
    return torch.cat([_states(model, batch, settings) for batch in _batches(prompts, settings.batch)]).mean(0)


def gradients(
    model: Any, prompts: Prompts, wanted: Tensor, names: Sequence[str], settings: Recovery
) -> tuple[dict[str, Tensor], float]:
    """Return the gradient of minus the cosine between each batch's mean state and a direction, added up over batches, and the mean cosine."""
    values = dict(model.named_parameters())
    flags = {name: value.requires_grad for name, value in values.items()}
    model.requires_grad_(False)
    chosen = [values[name].requires_grad_(True) for name in names]
    total = {name: torch.zeros_like(values[name]) for name in names}
    cosines = []
    try:
        for batch in _batches(prompts, settings.batch):
            cosine = nn.functional.cosine_similarity(_states(model, batch, settings).mean(0), wanted, dim=0)
            for name, one in zip(names, torch.autograd.grad(-cosine, chosen, allow_unused=True), strict=True):
                if one is not None:
                    total[name] += one
            cosines.append(float(cosine.detach()))
    finally:
        for name, value in values.items():
            value.requires_grad_(flags[name])
    return total, sum(cosines) / max(len(cosines), 1)


def _batches(prompts: Prompts, size: int) -> list[Prompts]:
    return [prompts[place : place + size] for place in range(0, len(prompts), size)]


class _Enough(Exception):
    """The states are there; the blocks behind need not be computed."""


def _states(model: Any, prompts: Prompts, settings: Recovery) -> Tensor:
    """Return each prompt's last state before ``settings.block``, ``(prompts, hidden)``; each is a pass of its own, so nothing is padded."""
    split, blocks, found = SplitModel(model), Anatomy.of(model).blocks, []
    device = next(model.parameters()).device

    def take(layer: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append((inputs[0] if inputs else keywords["hidden_states"])[0, -1])
        raise _Enough

    handle = split.causal.get_submodule(blocks[settings.place(len(blocks))].prefix).register_forward_pre_hook(
        take, with_kwargs=True
    )
    try:
        for prompt in prompts:
            try:
                split.hidden(input_ids=torch.tensor([list(within_context(model, prompt))], device=device))
            except _Enough:
                continue
    finally:
        handle.remove()
    return torch.stack(found)


def _put(values: dict[str, nn.Parameter], kept: dict[str, Tensor]) -> None:
    for name, value in kept.items():
        values[name].data.copy_(value)
