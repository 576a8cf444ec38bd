"""How much does one training step on a record help the target, and which records are foretold to help? (Information gain filtration)

Knows: the gain of a step on a record, measured for some records, and two learners that foretell it for all. Does not know: how a step is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from selectune.data.records import Record
from selectune.examples.factors.normalise import standard
from selectune.examples.factors.signals import GradientSketch, OwnEmbedding, Signal, Worker
from selectune.examples.factors.store import measure
from selectune.examples.method import Array, Ranked, something_trains
from selectune.examples.pool import Pool
from selectune.run import fingerprint

BATCH = 256
"""Records whose gain is foretold together."""


class GainOfStep(Signal):
    """How much one step on a record, from the base, lowers the perplexity of an objective; not-a-number where the record has nothing to learn."""

    shown: ClassVar[str] = "gain of a step"
    together: ClassVar[int | None] = 1
    optimiser: str
    learning_rate: float
    clip: float
    objective: str
    """Which records it is measured on."""
    _objective: list[Record] = PrivateAttr()
    _before: float | None = PrivateAttr(default=None)

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        from selectune.parameters import Context, Selection
        from selectune.parameters.factors.targets import targets
        from selectune.parameters.factors.trial import loss_on, trial

        assert worker is not None
        base, objective = worker.base, self._objective
        chosen = Selection.of(base.model, [target.name for target in targets(base)])
        drawn = torch.Generator().manual_seed(worker.seed)
        context = Context(base, worker.encoder, objective, [], drawn, worker.meter, worker.bfloat16, quiet=True)
        if self._before is None:
            self._before = float(np.exp(loss_on(context, objective)))
        found = np.full(len(records), np.nan)
        for number, record in enumerate(records):
            if worker.encoder.encode(record):
                stepped = trial(
                    context, chosen, records=[record], steps=1, learning_rate=self.learning_rate, batch=1,
                    optimiser=self.optimiser, clip=self.clip,
                )  # fmt: skip
                found[number] = self._before - np.exp(loss_on(context, objective, stepped.model))
        return found


def gains_of_steps(
    pool: Pool, records: Sequence[Record], objective: Sequence[Record], optimiser: str, learning_rate: float, clip: float
) -> Array:
    """Return how much one step on each record lowers the perplexity of the objective, see :class:`GainOfStep`; ``(records,)``.

    The base is as before.
    """
    asked = fingerprint([record.key for record in objective])
    signal = GainOfStep(optimiser=optimiser, learning_rate=learning_rate, clip=clip, objective=asked)
    signal._objective = list(objective)
    return measure(pool, signal, list(records))


def gains_of_gradients(pool: Pool, records: Sequence[Record], objective: Sequence[Record]) -> Array:
    """Return a plain step's gain over its learning rate as that goes to 0: ``perplexity * <gradient, mean gradient of the objective>``."""
    from selectune.parameters.factors.trial import loss_on

    signal = GradientSketch(unit=False)
    wanted = list(objective)
    sizes = np.array(
        [sum(label != -100 for piece in pool.encoder.encode(record) for label in piece.labels[1:]) for record in wanted]
    )
    mean = (measure(pool, signal, wanted).astype(np.float64) * sizes[:, None]).sum(0) / max(sizes.sum(), 1)
    return np.exp(loss_on(pool.context(objective), objective)) * (measure(pool, signal, list(records)).astype(np.float64) @ mean)


class Convolution(nn.Module):
    """Tokens to a number: the base's input embeddings (fixed), one convolution of width 3, the largest over the places, and a small network."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self._embeddings = embeddings
        self.convolution = nn.Conv1d(embeddings.shape[1], 256, 3, padding=1)
        self.rest = nn.Sequential(
            nn.Linear(256, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1)
        )

    def forward(self, ids: Tensor, real: Tensor) -> Tensor:
        """Return ``(batch,)``; ``ids`` and ``real`` (which are tokens, not padding) are ``(batch, length)``."""
        states = nn.functional.embedding(ids, self._embeddings).float() * real[..., None]
        found = self.convolution(states.transpose(1, 2)).masked_fill(~real[:, None], -torch.inf)
        guessed: Tensor = self.rest(found.amax(-1)).squeeze(-1)
        return guessed


def told_by_convolution(
    embeddings: Tensor, known: list[list[int]], gains: Array, asked: list[list[int]], *, epochs: int, rate: float, seed: int
) -> Array:
    """Train a convolution on known gains, keep it as it was where a held-out eighth was foretold best, and return what it says of others."""
    generator = torch.Generator().manual_seed(seed)
    wanted, held = torch.tensor(gains, dtype=torch.float32), max(1, len(known) // 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Convolution(embeddings.detach().float().cpu())
        optimiser = torch.optim.Adam(network.parameters(), lr=rate)
        best, kept = np.inf, {name: value.clone() for name, value in network.state_dict().items()}
        for _ in range(epochs):
            network.train()
            for batch in (torch.randperm(len(known) - held, generator=generator) + held).split(16):
                loss = (network(*_padded([known[number] for number in batch.tolist()])) - wanted[batch]).square().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            network.eval()
            with torch.no_grad():
                missed = float((network(*_padded(known[:held])) - wanted[:held]).square().mean())
            if missed < best:
                best, kept = missed, {name: value.clone() for name, value in network.state_dict().items()}
        network.load_state_dict(kept)
        network.eval()
    found = []
    with torch.no_grad():
        for start in range(0, len(asked), BATCH):
            found.append(network(*_padded(asked[start : start + BATCH])).double().numpy())
    return np.concatenate(found)


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, torch.arange(width)[None] < torch.tensor([len(row) for row in rows])[:, None]


def told_by_ridge(known: Array, gains: Array, asked: Array) -> Array:
    """Return gains foretold by ridge regression on standardised vectors; its strength by leaving one out."""
    from sklearn.linear_model import RidgeCV

    mean, spread = known.mean(0), known.std(0)
    scale = np.where(spread > 1e-9, spread, 1)
    fitted = RidgeCV(alphas=np.logspace(0, 6, 13)).fit((known - mean) / scale, gains)
    return np.asarray(fitted.predict((asked - mean) / scale))


class InformationGain(Ranked):
    """The records on which a training step is foretold to help the target most."""

    name: ClassVar[str] = "information_gain"
    family: ClassVar[str] = "target"
    paper: ClassVar[str] = "Selecting Informative Contexts Improves Language Model Fine-tuning, ACL 2021, arXiv 2005.00175"
    summary: ClassVar[str] = (
        "The highest foretold drop of the target's perplexity by one training step, learnt from steps on some records."
    )
    departs: ClassVar[str] = (
        "The highest are chosen before training, as many as the budget holds, instead of contexts being skipped by a threshold during it. A step "
        "is plain gradient descent on the blocks' matrices. The learner is ridge regression on the base's embeddings unless the paper's network is "
        "asked for (its embeddings then stay fixed). Far fewer gains are measured, on fewer target records: each costs passes of the base."
    )
    needs_target: ClassVar[bool] = True

    measured: Annotated[int, Field(gt=1)] = 128
    """Records whose gain is measured (the paper: about 10,000 pairs)."""
    objective: Annotated[int, Field(gt=0)] = 16
    """Target records on which gain is measured, the first by hash (the paper: 100)."""
    gain: Literal["step", "gradient"] = "step"
    """Of a real step, or of one so small that inner products of gradients tell it (one pass a record, no second look at the target)."""
    optimiser: Literal["sgd", "adamw"] = "sgd"
    """Of a step. AdamW's first step has nearly one size whatever the record (the paper's choice)."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    """Of a step (the paper: 5e-5 with AdamW)."""
    clip: Annotated[float, Field(gt=0)] = 3.0
    """Largest norm of a step's gradient."""
    learner: Literal["ridge", "convolution"] = "ridge"
    """What foretells the gain: ridge regression on embeddings, or a small convolutional network on tokens."""
    epochs: Annotated[int, Field(gt=0)] = 20
    """Of the network."""
    network_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of the network (the paper: 1e-5, with many more pairs)."""
    window: Annotated[int, Field(gt=0)] = 128
    """Tokens of a record that the network reads."""

    def score(self, pool: Pool) -> dict[str, Array]:
        from selectune.parameters.factors.gradients import first

        something_trains(pool)
        each = {pool.keys[place]: pool.records[place] for place in pool.order}
        keys = [key for key, record in each.items() if pool.encoder.encode(record)]
        keys = [keys[place] for place in pool.generator("information_gain").permutation(len(keys))][: self.measured]
        records, objective = [each[key] for key in keys], first(list(pool.target), self.objective)
        if self.gain == "gradient":
            gains = gains_of_gradients(pool, records, objective)
        else:
            gains = gains_of_steps(pool, records, objective, self.optimiser, self.learning_rate, self.clip)
        measured = np.isfinite(gains)
        if not measured.all():
            pool.notes.append(
                f"the gain of {int((~measured).sum()):,} of {len(gains):,} steps is not finite and teaches nothing: the steps are too long"
            )
        taught = [record for record, finite in zip(records, measured.tolist(), strict=True) if finite]
        told = self._told(pool, taught, standard(gains[measured]), list(each.values()))
        known, foretold = dict(zip(keys, gains.tolist(), strict=True)), dict(zip(each, told.tolist(), strict=True))
        return {
            "foretold gain": np.array([foretold[key] for key in pool.keys]),
            "gain": np.array([known.get(key, np.nan) for key in pool.keys]),
        }

    def _told(self, pool: Pool, records: list[Record], gains: Array, asked: list[Record]) -> Array:
        if len(records) < 2 or not np.ptp(gains):
            return np.zeros(len(asked))
        if self.learner == "ridge":
            signal = OwnEmbedding(of="both")
            return told_by_ridge(measure(pool, signal, records), gains, measure(pool, signal, asked))
        table: Any = pool.base.model.get_input_embeddings().weight
        read, wanted = ([self._read(pool, record) for record in some] for some in (records, asked))
        return told_by_convolution(table, read, gains, wanted, epochs=self.epochs, rate=self.network_rate, seed=pool.seed)

    def _read(self, pool: Pool, record: Record) -> list[int]:
        pieces = pool.encoder.encode(record)
        return pieces[0].input_ids[: self.window] if pieces else [pool.base.tokenizer.eos_token_id]
