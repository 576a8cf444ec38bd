"""Salient channels: in each output projection, the channels that are largest on the data.

What is chosen are the channels' rows of the projections back into the hidden state: the form ``sct`` puts a small map among them, the form ``full``
trains them. Knows: the score. Does not know: what is done with the channels.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.models.head import SplitModel
from selectune.parameters.factors.allocation import best
from selectune.parameters.factors.gradients import batch_of, first, rows_of
from selectune.parameters.factors.targets import Target, targets
from selectune.parameters.factors.trial import in_bfloat16
from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Form, Part, Selection
from selectune.progress import watched


class SalientChannels(ParameterMethod):
    """The channels of the largest norm over the data."""

    name: ClassVar[str] = "sct"
    family: ClassVar[str] = "heads-neurons-channels"
    usual_form: ClassVar[str] = "sct"
    paper: ClassVar[str] = "SCT: A Simple Baseline for Parameter-Efficient Fine-Tuning via Salient Channels, arXiv 2309.08513"
    summary: ClassVar[str] = (
        "In each output projection, the channels with the largest norm on the training data; meant for the form `sct`."
    )
    departs: ClassVar[str] = (
        "Channels of what a projection adds to the hidden state, so that the form can be folded; files of the training data take the place of "
        "classes. A record's first token is left out, and each token's features are divided by their root mean square: a few channels of a "
        "language model are huge on any text."
    )

    channels: Annotated[int, Field(gt=0)] | None = None
    """Channels of each projection; left out: an eighth of them."""
    place: Literal["attention_output", "down"] = "attention_output"
    """Behind attention or behind the MLP."""
    examples: Annotated[int, Field(gt=0)] = 64
    """Training records to read, the first by hash of their content."""

    def select(self, context: Context) -> Selection:
        parts = {}
        for target, scores in self.scores(context).items():
            if self.channels is not None and self.channels > len(scores):
                raise UserError(
                    f"{self.channels} channels are asked for and there are {len(scores)}", field="parameters.channels"
                )
            form: Form = "columns" if target.transposed else "rows"
            parts[target.name] = Part(target.shape, form, best(scores, self.channels or max(len(scores) // 8, 1)))
        return Selection(dict(sorted(parts.items())))

    @torch.no_grad()
    def scores(self, context: Context) -> dict[Target, Tensor]:
        """Return, for each projection, the mean over files of each channel's norm over tokens, ``(channels,)`` fp64."""
        eligible = [target for target in targets(context.base, self.place) if len(target.shape) == 2]
        if not eligible:
            raise UserError(
                "the experts of a mixture have no projection in common", field="parameters.place", expected="attention_output"
            )
        records = first(context.train, self.examples)
        context.examples_scored = len(records)
        squares: dict[str, dict[Target, Tensor]] = defaultdict(dict)
        model, source = context.base.model, ""
        split = SplitModel(model)

        def watch(target: Target) -> Any:
            def look(layer: Any, inputs: Any, output: Tensor) -> None:
                states = output.detach().double().flatten(0, -2)[1:]
                states = states / states.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
                squares[source][target] = squares[source].get(target, 0) + states.square().sum(0).cpu()

            return look

        with ExitStack() as stack:
            for target in eligible:
                layer = model.get_submodule(target.name.removesuffix(".weight"))
                stack.callback(layer.register_forward_hook(watch(target)).remove)
            rows_of(context, records)  # some of them have something to learn
            for record in watched(
                [one for one in records if context.encoder.encode(one)], "following the channels", context.quiet
            ):
                source = record.source
                for row in rows_of(context, [record]):
                    batch = batch_of(model, [row])
                    with torch.autocast(model.device.type, torch.bfloat16, enabled=in_bfloat16(context)):
                        split.hidden(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
                    context.meter.count(forward=len(row["input_ids"]))
        return {target: torch.stack([one[target].sqrt() for one in squares.values()]).mean(0) for target in eligible}
