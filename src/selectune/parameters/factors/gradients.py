"""Gradients over examples, added up without ever holding more than one weight's.

Knows: how a base's gradient on training records is computed (one record a pass, or packed records), and how its mean, its mean size
and its mean square are gathered in fp32. Does not know: what they mean for a choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from selectune.data.packing import pack, stack
from selectune.errors import UserError
from selectune.progress import watched

if TYPE_CHECKING:
    from selectune.data import Record
    from selectune.meter import Meter
    from selectune.parameters.method import Context
    from selectune.training.loss import LossOfModel

Statistic = Literal["mean", "absolute", "squared"]


def first(records: Sequence[Record], count: int) -> list[Record]:
    """Return the first records by hash of their content: the same ones whatever their order."""
    return sorted(records, key=lambda record: record.key)[:count]


def rows_of(context: Context, records: Sequence[Record], packed: bool = False) -> list[dict[str, Tensor]]:
    """Return records as rows of ``input_ids``, ``labels`` and ``position_ids``, each ``(length,)`` int64: one a record, or packed.

    Raises:
        UserError: none of the records has anything to learn.
    """
    pieces = [piece for record in records for piece in context.encoder.encode(record)]
    if not pieces:
        raise UserError("none of the records has a response to learn from", field="data.train",
                        mend="give records with responses, or a larger data.max_length")  # fmt: skip
    return pack(pieces, context.encoder.max_length, packed, context.base.tokenizer.pad_token_id)


def batch_of(model: Any, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return rows as a batch, ``(rows, longest)`` each, on the device of a model."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in stack(list(rows)).items()}


def gather(
    context: Context,
    names: Iterable[str],
    statistics: Iterable[Statistic],
    *,
    examples: int = 64,
    records: Sequence[Record] | None = None,
    packed: bool = False,
    loss: Literal["mean", "sum"] = "mean",
    labels: Literal["true", "sampled"] = "true",
    alter: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> dict[Statistic, dict[str, Tensor]]:
    """Return statistics of the gradient of the loss on some records' responses at the base's weights.

    Args:
        names: parameters. statistics: ``mean`` of the signed gradients, of their ``absolute`` values, of their squares (``squared``).
        examples: so many of ``records`` (the training records), the first by hash of their content.
        packed: several records a pass; fewer passes, and ``absolute`` and ``squared`` are then of packs.
        loss: of a record: the mean or the sum over its response tokens. labels: as in :func:`each_gradient`.
        alter: changes a row before it is used.

    Returns:
        statistic -> name -> fp32 tensor of the parameter's shape, on its device.
    """
    chosen = first(context.train if records is None else records, examples)
    rows = rows_of(context, chosen, packed)
    rows = rows if alter is None else [alter(row) for row in rows]
    weights = dict(context.base.model.named_parameters())
    wanted = list(names)
    totals: dict[Statistic, dict[str, Tensor]] = {
        kind: {name: torch.zeros(weights[name].shape, dtype=torch.float32, device=weights[name].device) for name in wanted}
        for kind in statistics
    }

    def add(name: str, gradient: Tensor, tokens: int) -> None:
        if loss == "mean":
            gradient = gradient / max(tokens, 1)
        for kind, total in totals.items():
            if kind == "mean":
                total[name].add_(gradient)
            elif kind == "absolute":
                total[name].add_(gradient.abs())
            else:
                total[name].addcmul_(gradient, gradient)

    each_gradient(context.base.model, rows, wanted, add, labels=labels, generator=context.generator, meter=context.meter,
                  bfloat16=context.bfloat16, quiet=context.quiet)  # fmt: skip
    context.examples_scored = max(context.examples_scored, len(chosen))
    for total in totals.values():
        for name, value in total.items():
            value.div_(len(rows))
            if not value.isfinite().all():
                raise UserError(f"the gradient of '{name}' is not finite on these records", field="base",
                                expected="a base whose loss on them is finite", mend="compute in fp32 (training.precision)")  # fmt: skip
    return totals


def each_gradient(
    model: Any,
    rows: Sequence[dict[str, Tensor]],
    names: Iterable[str],
    use: Callable[[str, Tensor, int], None],
    *,
    labels: Literal["true", "sampled"] = "true",
    generator: torch.Generator | None = None,
    meter: Meter | None = None,
    bfloat16: bool = False,
    quiet: bool = False,
) -> None:
    """Give each weight's gradient of each row's summed loss to ``use(name, gradient, response tokens)``, and free it.

    The gradient is fp32 on the weight's device; the model's flags are put back. Nothing of the model changes.

    Args:
        labels: ``sampled``: the responses' tokens are drawn from the model instead (the true Fisher information).
    """
    from selectune.objectives.cross_entropy import CrossEntropy
    from selectune.training.loss import LossOfModel

    wanted = set(names)
    before = {name: (value.requires_grad, value.grad) for name, value in model.named_parameters()}
    model.requires_grad_(False)
    scored = {name: value for name, value in model.named_parameters() if name in wanted}
    tokens = 0
    hooks = []

    def hook(name: str) -> Callable[[nn.Parameter], None]:
        def take(value: nn.Parameter) -> None:
            assert value.grad is not None
            use(name, value.grad.float(), tokens)
            value.grad = None

        return take

    for name, value in scored.items():
        value.requires_grad_(True)
        value.grad = None
        hooks.append(value.register_post_accumulate_grad_hook(hook(name)))
    whole = LossOfModel(model, CrossEntropy(), bfloat16)
    try:
        with whole.attending(list(rows)):
            for row in watched(rows, "scoring", quiet):
                batch = batch_of(model, [row])
                if labels == "sampled":
                    batch["labels"] = _sampled(whole, batch, generator)
                tokens = int((row["labels"][1:] != -100).sum())
                whole(**batch).backward()
                if meter is not None:
                    meter.count(forward=batch["input_ids"].numel(), backward=batch["input_ids"].numel())
    finally:
        for one in hooks:
            one.remove()
        for name, value in model.named_parameters():
            flag, value.grad = before[name]
            value.requires_grad_(flag)


@torch.no_grad()
def _sampled(whole: LossOfModel, batch: dict[str, Tensor], generator: torch.Generator | None) -> Tensor:
    """Return labels drawn from the model at the places of the true ones."""
    places = (batch["labels"][0, 1:] != -100).nonzero().squeeze(-1)
    with whole.autocast():
        probabilities = whole.split.logits(whole.states(**batch)[0, places]).float().softmax(-1)
    drawn = batch["labels"].clone()
    drawn[0, places + 1] = torch.multinomial(probabilities.cpu(), 1, generator=generator).squeeze(-1).to(places.device)
    return drawn
