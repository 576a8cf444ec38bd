"""Layers through which a change of the input flows: conductance along the way from a masked to the full input.

Knows: the way (token after token is revealed, in random order or from the least surprising), a layer's conductance on it, and how many
layers are taken. Does not know: how a selection trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from selectune.models.head import SplitModel
from selectune.parameters.factors.allocation import best
from selectune.parameters.factors.gradients import batch_of, first, rows_of
from selectune.parameters.factors.trial import hooked
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection
from selectune.progress import watched

if TYPE_CHECKING:
    from collections.abc import Mapping


def conductance(modules: Mapping[str, Any], passes: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Return each module's conductance, ``sum over t >= 1 of (dL/dy_t) * (y_t - y_{t-1})`` elementwise, in fp32.

    Args:
        modules: whose outputs ``y`` are watched; each is met once in a pass. passes: for t = 0, 1, ...: computes the scalar ``L``.
    """
    now: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}

    def watch(name: str, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        now[name] = value.detach().float()
        if name in before and value.requires_grad:
            change = now[name] - before[name]

            def add(gradient: Tensor) -> None:
                part = gradient.float() * change
                total[name] = total[name] + part if name in total else part

            value.register_hook(add)

    with hooked(dict(modules), watch):
        for number, one in enumerate(passes):
            with torch.set_grad_enabled(number > 0):
                loss = one()
            if number > 0:
                loss.backward()  # type: ignore[no-untyped-call]
            before = dict(now)
    return total


class Conductance(ParameterMethod):
    """The layers with the highest conductance."""

    name: ClassVar[str] = "conductance"
    family: ClassVar[str] = "blocks"
    usual_form: ClassVar[str] = "lora"
    paper: ClassVar[str] = (
        "Restore Anything with Masks, ECCV 2024, arXiv 2409.19403 (random order); RAM++, 2025, arXiv 2509.12039 (adaptive order)"
    )
    summary: ClassVar[str] = (
        "The layers through which the change from a masked to the full input flows (mask attribute conductance)."
    )
    departs: ClassVar[str] = (
        "Language instead of images: tokens are revealed from the mean embedding, what is explained is the log-probability of the response, "
        "the path has fewer steps, and the mask's edge is sharp. The adaptive order goes from the least to the most surprising token of "
        "the base, in place of a mask generator trained for images. Nothing keeps hidden states near the base's (its second "
        "half, feature rectification). Stacks of experts are no linear layers and are not ranked. What is chosen trains by LoRA where no form is "
        "named; `form: full` is the papers'."
    )

    unit: Literal["linear", "block"] = "linear"
    """What is ranked: linear layers (with their biases), or whole blocks."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the layers that trains, by number; the paper's best results have 0.3."""
    order: Literal["random", "adaptive"] = "random"
    """In which tokens are revealed."""
    masked: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the tokens that is masked where the path begins."""
    steps: Annotated[int, Field(gt=0)] = 20
    """Of the path."""
    examples: Annotated[int, Field(gt=0)] = 16
    """Training records, the first by hash of their content."""

    def select(self, context: Context) -> Selection:
        base, blocks = context.base, context.base.anatomy.blocks
        if self.unit == "block":
            names = {block.prefix: list(block.parameters) for block in blocks}
        else:
            names = {m: [n for n in block.parameters if n.rpartition(".")[0] == m] for block in blocks for m in block.linears}
        scores = self.scores(context, list(names))
        order = list(names)
        count = max(1, round(self.ratio * len(order)))
        chosen = best(torch.tensor([scores[name] for name in order], dtype=torch.float64), count).tolist()
        for block in blocks:
            context.block_scores[block.index] = sum(
                value for name, value in scores.items() if f"{name}.".startswith(f"{block.prefix}.")
            )
        return Selection.of(base.model, [name for place in chosen for name in names[order[place]]])

    def scores(self, context: Context, modules: list[str]) -> dict[str, float]:
        """Return each module's mean absolute conductance, summed over the records."""
        model = context.base.model
        places = {name: model.get_submodule(name) for name in modules}
        records = first(context.train, self.examples)
        rows = rows_of(context, records)
        context.examples_scored = len(records)
        entry = model.get_input_embeddings()
        with torch.no_grad():
            empty = entry(torch.arange(entry.weight.shape[0], device=entry.weight.device)).float().mean(0)
        total = dict.fromkeys(modules, 0.0)
        for row in watched(rows, "following the input", context.quiet):
            found = conductance(places, self._passes(context, row, empty))
            for name, value in found.items():
                total[name] += float(value.abs().mean())
        return total

    def _passes(self, context: Context, row: dict[str, Tensor], empty: Tensor) -> Iterable[Callable[[], Tensor]]:
        """The passes of one record, from masked to full."""
        model, split = context.base.model, SplitModel(context.base.model)
        batch, length = batch_of(model, [row]), len(row["input_ids"])
        ids, labels = batch["input_ids"], batch["labels"][0, 1:]
        places = (labels != -100).nonzero().squeeze(-1)
        shuffled = torch.randperm(length, generator=context.generator)
        if self.order == "adaptive":
            shuffled = shuffled[self.surprisal(context, row)[shuffled].argsort(stable=True)]
        rank = shuffled.argsort().to(ids.device)

        def at(share: float) -> Tensor:
            shown = (rank < math.ceil(share * length - 1e-9))[None, :, None]

            def reveal(name: str, module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
                return torch.where(shown, output, empty.to(output.dtype)).detach().requires_grad_(torch.is_grad_enabled())

            with hooked({"embeddings": model.get_input_embeddings()}, reveal):
                context.meter.count(forward=length, backward=length if torch.is_grad_enabled() else 0)
                with torch.autocast(ids.device.type, torch.bfloat16, enabled=context.bfloat16):
                    hidden = split.hidden(input_ids=ids)
                    odds = split.logits(hidden[0, places]).float().log_softmax(-1)
                return odds[torch.arange(len(places), device=ids.device), labels[places]].sum()

        for step in range(self.steps + 1):
            share = 1 - self.masked * (1 - step / self.steps)
            yield partial(at, share)

    def surprisal(self, context: Context, row: dict[str, Tensor]) -> Tensor:
        """Return the base's surprise at each token, ``(length,)``; the first has none."""
        model = context.base.model
        split, ids = SplitModel(model), batch_of(model, [row])["input_ids"][0]
        with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=context.bfloat16):
            odds = split.logits(split.hidden(input_ids=ids[None])[0, :-1]).float().log_softmax(-1)
        context.meter.count(forward=len(ids))
        return torch.cat([torch.zeros(1), -odds.gather(-1, ids[1:, None])[:, 0].cpu()])
