"""A specialist learns from a few records that bear on one question, answers it, and is then what it was, bit for bit.

Knows: which records leave least uncertainty about a question, how many of them are worth a step, and how what a specialist trained trains again
and is put back. Does not know: where questions come from, or how answers are shown.

Source: SIFT, *Efficiently Learning at Test-Time: Active Fine-Tuning of LLMs*, ICLR 2025, arXiv 2410.08020: one step for each chosen record, in
order, from the specialist's weights; step ``n`` is worth it while the uncertainty that it leaves is at most ``1 / (alpha n)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from selectune import catalogue
from selectune.adapters import load_specialist
from selectune.adapters.form import CHANGED, PLACES, read_origin
from selectune.data import Encoder
from selectune.data.packing import pack, stack
from selectune.data.prepare import read_pool
from selectune.data.records import Message, Record
from selectune.errors import UserError
from selectune.evaluation.scorer import Scorer
from selectune.examples import Pool
from selectune.examples.factors.signals import SentenceEmbedding
from selectune.examples.factors.store import measure
from selectune.examples.toward_target import around_their_mean, least_uncertain
from selectune.models import bf16_is_fast, load_base
from selectune.objectives.cross_entropy import CrossEntropy
from selectune.parameters.selection import Selection
from selectune.run import Run
from selectune.training.loss import LossOfModel
from selectune.training.partial import release_entries, train_entries

Array = np.ndarray


@dataclass(frozen=True)
class Settings:
    """How much is learnt for one question."""

    steps: int = 50
    """At most; a record may be taken again."""
    alpha: float | None = 0.2
    """The larger, the fewer steps (see the module); None takes all of them."""
    neighbours: int = 200
    """Records nearest to the question, among which is chosen."""
    noise: float = 0.01
    """Of an observation."""
    learning_rate: float | None = None
    """Left out: half of what the specialist's form trains with (5e-5 in place, 5e-4 for LoRA, as in the paper)."""

    def __post_init__(self) -> None:
        for name in ("steps", "neighbours"):
            if getattr(self, name) < 1:
                raise UserError(f"is {getattr(self, name)}", field=name, expected="at least 1")
        for name in ("alpha", "noise", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"is {value:g}", field=name, expected="a number above 0")


@dataclass(frozen=True)
class Answer:
    """An answer, and what was learnt for it."""

    text: str
    without: str | None = None
    """The specialist's own, where it was asked for too."""
    records: list[Record] = field(default_factory=list)
    """What was learnt, a step each."""
    uncertainty: list[float] = field(default_factory=list)
    """About the question, 1 for a pool that says nothing of it: before, and after each record."""


class Specialist:
    """A run's specialist, ready to answer.

    Args:
        run: with a finished specialist. pool: files of records to learn from; left out: it answers as it is. columns: roles of their columns.

    Raises:
        UserError: there is no specialist yet, or the records cannot be read.
    """

    def __init__(
        self, run: Run, pool: str | list[str] | None = None, columns: dict[str, str] | None = None, quiet: bool = False
    ) -> None:
        self._folder = run.path("specialist")
        self._form: Any = catalogue.create("adapters", read_origin(self._folder)["form"])
        records = [] if pool is None else read_pool(pool, columns or {}, "--adapt")
        base = load_base(run.recipe.base, "fast")
        self._tokenizer, self._encoder = (
            base.tokenizer,
            Encoder(base.tokenizer, run.recipe.data.max_length, "truncate", run.recipe.data.system),
        )
        theirs = {id(value) for value in base.model.parameters()}
        self.model = load_specialist(base, self._folder)
        self._added = [value for value in self.model.parameters() if id(value) not in theirs]
        self._bfloat16 = bf16_is_fast()
        self._pool = Pool(records, lambda: base, lambda words: self._encoder, quiet=quiet, folder=run.path("examples"))

    def answer(self, question: str, settings: Settings | None = None, max_new_tokens: int = 200) -> Answer:
        """Answer a question; with a pool, after learning from what it has on it (and as it is, to compare with)."""
        if not question.strip():
            raise UserError("the question is empty", field="question")
        without = self._say(question, max_new_tokens)
        if not len(self._pool):
            return Answer(without)
        records, uncertainty, rows = self.chosen(question, settings or Settings())
        if not rows:
            return Answer(without, without, [], uncertainty)
        rate = (settings or Settings()).learning_rate or self._form.learning_rate_default / 2
        with adapted(self.model, self._folder, self._added, rows, rate, self._bfloat16):
            return Answer(self._say(question, max_new_tokens), without, records, uncertainty)

    def chosen(self, question: str, settings: Settings) -> tuple[list[Record], list[float], list[dict[str, Tensor]]]:
        """Return the records that are worth a step, the uncertainty before and after each, and their tokens."""
        signal = SentenceEmbedding()
        vectors = measure(self._pool, signal)
        wanted = signal.measure(None, [Record("chat", (Message("user", question), Message("assistant", "")))])
        order = self._pool.order[self._pool.tokens[self._pool.order] > 0]  # from the others nothing is learnt
        if not len(order):
            return [], [1.0], []
        vectors, wanted = around_their_mean(vectors, wanted, order)
        places, uncertainty = worth_a_step(vectors, wanted[0], order, settings)
        records = [self._pool.records[place] for place in places]
        pieces = [self._encoder.encode(record)[0] for record in records]
        return records, uncertainty, [pack([piece], len(piece.input_ids), packing=False)[0] for piece in pieces]

    def _say(self, question: str, max_new_tokens: int) -> str:
        return say(self.model, self._tokenizer, self._encoder, question, max_new_tokens)


def say(model: Any, tokenizer: Any, encoder: Encoder, question: str, max_new_tokens: int = 200) -> str:
    """Return a model's answer to a question."""
    ids = encoder.prompt_ids((Message("user", question),))
    return Scorer(model, tokenizer).generate([ids], max_new_tokens)[0].strip()


def worth_a_step(vectors: Array, wanted: Array, order: Array, settings: Settings) -> tuple[list[int], list[float]]:
    """Return the places to learn from, one after the other, and the uncertainty before and after each.

    Args:
        vectors: ``(records, d)``, unit length. wanted: ``(d,)``, the question's. order: of the records, for ties.
    """
    like = vectors[order] @ wanted  # what points away from the question is no evidence, however long
    near = order[np.argsort(-like, kind="stable")][: min(settings.neighbours, int((like > 0).sum()))]
    if not len(near):
        return [], [float(np.linalg.norm(wanted))]
    places, left = least_uncertain(vectors[near], wanted[None], settings.steps, settings.noise, repeat=True)
    after = np.sqrt(left)
    count = len(after)
    if settings.alpha is not None:
        enough = after <= 1 / (settings.alpha * np.arange(1, len(after) + 1))
        count = len(after) if enough.all() else int(enough.argmin())
    return near[places[:count]].tolist(), [float(np.linalg.norm(wanted)), *after[:count].tolist()]


@contextmanager
def adapted(
    model: Any,
    folder: Path,
    added: Sequence[nn.Parameter],
    rows: Sequence[dict[str, Tensor]],
    learning_rate: float,
    bfloat16: bool,
) -> Iterator[list[float]]:
    """Within, a specialist has learnt from some sequences, a step each; afterwards all its weights are what they were, bit for bit.

    What the specialist trained trains again: its adapter, or the weights (or the parts of them) that it changed.

    Args:
        folder: of the specialist. added: the adapter's parameters, where it is one.
        rows: ``input_ids``, ``labels`` and ``position_ids``, each ``(length,)`` int64.

    Yields:
        The mean loss of each sequence before its step, nats per response token.
    """
    changed = _changed(model, folder) if (folder / CHANGED).is_file() else None
    weights = dict(model.named_parameters())
    own = list(added) if changed is None else [weights[name] for name in changed.names()]
    kept, dtype = _Kept(model, own), own[0].dtype
    try:
        try:
            trained = own if changed is None else list(train_entries(model, changed).values())
            losses = _learn(model, trained, rows, learning_rate, bfloat16)
        finally:
            if changed is not None:
                release_entries(model, dtype)
        yield losses
    finally:
        kept.put_back()
        model.eval().requires_grad_(False)


def _changed(model: Any, folder: Path) -> Selection:
    """Return which weights, and which parts of them, a specialist changed in place."""
    with safe_open(folder / CHANGED, framework="pt") as file:
        names = set(file.keys())
    parts = Selection.load(folder / PLACES).parts if (folder / PLACES).is_file() else {}
    return Selection({**Selection.of(model, names - parts.keys()).parts, **parts})


def _learn(
    model: Any, trained: list[Any], rows: Sequence[dict[str, Tensor]], learning_rate: float, bfloat16: bool
) -> list[float]:
    """Take a step on each sequence, and return its loss before it."""
    for value in trained:
        value.data = value.data.float()
        value.requires_grad_(True)
    optimiser, losses = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0), []
    whole, device = LossOfModel(model, CrossEntropy(), bfloat16), next(model.parameters()).device
    with whole.attending(list(rows)):
        for row in rows:
            inputs = {key: value.to(device) for key, value in stack([row]).items()}
            loss = whole(**inputs) / (inputs["labels"][:, 1:] != -100).sum().clamp(min=1)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(loss.item())
    return losses


class _Kept:
    """What a model was: its parameters, the values of those that may be written in place, and how its adapters take their inputs."""

    def __init__(self, model: nn.Module, written: Sequence[nn.Parameter]) -> None:
        self._parameters = [
            (module, key, value, None if value is None else value.data)
            for module in model.modules()
            for key, value in module._parameters.items()
        ]
        self._values = [(value.data, value.data.clone()) for value in written]
        self._casts = [(module, module.cast_input_dtype_enabled) for module in model.modules() if hasattr(module, _CAST)]

    @torch.no_grad()
    def put_back(self) -> None:
        for written, values in self._values:
            written.copy_(values)
        for module, key, value, data in self._parameters:
            module._parameters[key] = value
            if value is not None and data is not None:
                value.data, value.grad = data, None
        for module, casts in self._casts:
            setattr(module, _CAST, casts)


_CAST = "cast_input_dtype_enabled"  # PEFT's; a loss in bf16 switches it off
