"""How much does one record, shown as an example, help with another? And a choice that covers the pool by such help.

Knows: the in-context utility of a pair, the whole matrix of them, a small network that guesses most of it from embeddings (NN-CIFT), and the three
objectives over it. Does not know: how a submodular function is maximised.
"""

from __future__ import annotations

import copy
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PrivateAttr

from selectune.data.chat import Encoded
from selectune.data.records import Record
from selectune.errors import UserError
from selectune.examples.factors.normalise import minimum_maximum
from selectune.examples.factors.shown import shown_alone, shown_before
from selectune.examples.factors.signals import SentenceEmbedding, Signal, Worker
from selectune.examples.factors.store import measure
from selectune.examples.factors.submodular import FacilityLocation, OfMatrix, lazy_greedy
from selectune.examples.method import Array, Choice, ExampleMethod
from selectune.examples.pool import Pool
from selectune.run import fingerprint

HELD = 0.2
"""Share of the measured pairs that tells how good guesses are, and teaches none."""


def distance(worker: Worker, pieces: list[Encoded]) -> Array:
    """Return ``||1 - p||_2 / sqrt(T)`` of each piece, p the probabilities of its T labelled tokens: 0 where all are certain."""
    found = np.empty(len(pieces))
    for number, logs in enumerate(worker.log_probabilities(pieces)):
        found[number] = np.sqrt(np.mean((1 - np.exp(logs.astype(np.float64))) ** 2)) if len(logs) else 1.0
    return found


class HelpFrom(Signal):
    """How much each of some helpers, shown before it, lowers a record's distance, ``(records, helpers)``; not-a-number for its equals, and for a
    helper that leaves no room for the record."""

    shown: ClassVar[str] = "help of examples"
    width: ClassVar[int | None] = 0
    together: ClassVar[int | None] = 1
    helpers: str
    """Which they are."""
    _helpers: list[Record] = PrivateAttr()

    @classmethod
    def of(cls, helpers: list[Record]) -> HelpFrom:
        """Return the signal of these helpers, in this order."""
        made = cls(helpers=fingerprint([record.key for record in helpers]))
        made._helpers = helpers
        return made

    def measure(self, worker: Worker | None, records: list[Record]) -> Array:
        assert worker is not None
        found = np.full((len(records), len(self._helpers)), np.nan, dtype=np.float32)
        for row, record in enumerate(records):
            pieces = {
                column: piece
                for column, example in enumerate(self._helpers)
                if example.key != record.key and (piece := shown_before(worker, example, record)) is not None
            }
            plain, *helped = distance(worker, [shown_alone(worker, record), *pieces.values()])
            found[row, list(pieces)] = plain - np.array(helped)
        return found


def utilities(pool: Pool, helped: list[Record], helpers: list[Record]) -> Array:
    """Return how much each helper, shown before it, lowers each helped record's distance, see :class:`HelpFrom`: ``(helped, helpers)``."""
    return measure(pool, HelpFrom.of(helpers), helped).astype(np.float64).reshape(len(helped), len(helpers))


def guessed(
    known: Array, rows: Array, columns: Array, seed: int, hidden: int = 64, epochs: int = 60, patience: int = 5
) -> tuple[Array, tuple[float, float]]:
    """Guess most of a matrix of which a corner is known by a small network from vectors of its rows and columns (NN-CIFT).

    A fifth of the known pairs is held out. The network is the one of the epoch with the least error on them, and learns no longer
    once so many epochs were no better.

    Args:
        known: ``(r, c)``, the corner; not-a-number teaches nothing, and stays.
        rows: ``(R, d)``, columns: ``(C, d)`` vectors; the first r and c of them belong to the corner.

    Returns:
        The matrix, ``(R, C)``, and the mean squared errors on the pairs held out: of the network, and of the mean of the others
        (not-a-number where the pairs are too few to hold any out).
    """
    found = np.full((len(rows), len(columns)), np.nan)
    pairs = torch.tensor(np.argwhere(np.isfinite(known)))
    if not len(pairs):
        return found, (np.nan, np.nan)
    generator = torch.Generator().manual_seed(seed)
    size = rows.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(torch.nn.Linear(2 * size + 1, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 1))
    left, right = torch.tensor(rows, dtype=torch.float32), torch.tensor(columns, dtype=torch.float32)
    mixed = pairs[torch.randperm(len(pairs), generator=generator)]
    held, taught = mixed.split([round(HELD * len(pairs)), len(pairs) - round(HELD * len(pairs))])
    wanted = torch.tensor(known, dtype=torch.float32)
    values = wanted[taught[:, 0], taught[:, 1]]
    mean, spread = values.mean(), values.std(correction=0).clamp(min=1e-9)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)

    def guess(some: torch.Tensor) -> torch.Tensor:
        middle = torch.zeros(len(some), 1)
        return network(torch.cat([left[some[:, 0]], middle, right[some[:, 1]]], dim=1)).squeeze(-1)

    def error(some: torch.Tensor) -> torch.Tensor:
        return (guess(some) - (wanted[some[:, 0], some[:, 1]] - mean) / spread).square().mean()

    errors: list[float] = []
    watched = held if len(held) else taught
    for _ in range(epochs):
        for batch in taught[torch.randperm(len(taught), generator=generator)].split(256):
            optimiser.zero_grad()
            error(batch).backward()
            optimiser.step()
        with torch.no_grad():
            errors.append(float(error(watched)))
        if len(errors) == 1 or errors[-1] < min(errors[:-1]):
            best = copy.deepcopy(network.state_dict())
        elif len(errors) - errors.index(min(errors)) > patience:
            break
    network.load_state_dict(best)
    with torch.no_grad():
        for row in range(len(rows)):
            some = torch.stack([torch.full((len(columns),), row), torch.arange(len(columns))], dim=1)
            found[row] = (guess(some) * spread + mean).numpy()
    found[: known.shape[0], : known.shape[1]] = known
    plain = float((wanted[held[:, 0], held[:, 1]] - mean).square().mean())
    return found, (min(errors) * float(spread) ** 2 if len(held) else np.nan, plain)


class InContextUtility(ExampleMethod):
    """The records that, as examples, help most with all others; or with a target; or with what is not known yet."""

    name: ClassVar[str] = "delift"
    family: ClassVar[str] = "target"
    paper: ClassVar[str] = "DELIFT: Data Efficient Language Model Instruction Fine-Tuning, ICLR 2025, arXiv 2411.04425"
    summary: ClassVar[str] = (
        "Facility location over pairwise in-context utility: for the pool, toward a target, or beside what is known."
    )
    departs: ClassVar[str] = (
        "The example is a turn of the same conversation; a record's help to itself or to its equals does not count, nor that of "
        "an example beside which the record does not fit: such pairs are 0 on the scale of the others."
    )

    stage: Literal["general", "target", "continual"] = "general"
    """Cover the pool (1); cover it only as far as a target asks (2, mutual information); or beyond what known records cover (3, conditional gain).
    For 2 and 3 the target records are the ones asked for, or known."""
    measured: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the pool whose pairs are measured; the rest is guessed from embeddings."""
    most: Annotated[int, Field(gt=0)] = 2000
    """Larger pools are refused: pairs grow with the square."""

    def choose(self, pool: Pool) -> Choice:
        if len(pool) > self.most:
            mend = (
                "use nn_cift, which measures some and guesses the rest"
                if self.measured == 1
                else "choose from a part of the pool"
            )
            raise UserError(f"{len(pool):,} records make {len(pool) ** 2:,} pairs", field="examples.most",
                            expected=f"a pool of at most {self.most:,}", mend=mend)  # fmt: skip
        if self.stage != "general" and not pool.target:
            raise UserError(f"stage '{self.stage}' of '{self.name}' needs target records", field="examples.stage",
                            mend="give --target FILE, or data.target in the recipe")  # fmt: skip
        order = pool.order[pool.generator("corner").permutation(len(pool))] if self.measured < 1 else pool.order
        records = [pool.records[place] for place in order]
        kernel = self._matrix(pool, records, records)
        floor = cap = None
        if self.stage != "general":
            target = sorted(pool.target, key=lambda record: record.key)
            drawn = pool.generator("corner of the target").permutation(len(target))
            toward = self._matrix(pool, records, [target[place] for place in drawn]).max(1)
            floor, cap = (toward, None) if self.stage == "continual" else (None, toward)
        count = self.needed(pool)
        places, gains = lazy_greedy(FacilityLocation(OfMatrix(kernel), floor, cap), count)
        gained = np.full(len(pool), np.nan)
        gained[order[places]] = gains
        return Choice(self.fill(pool, order[places]), {"added utility": gained})

    def _matrix(self, pool: Pool, helped: list[Record], helpers: list[Record]) -> Array:
        """Return the utilities on 0 to 1, ``(helped, helpers)``; pairs that have none are no part of the scale, and 0."""
        count = max(2, round(self.measured * len(helped))), max(2, round(self.measured * len(helpers)))
        known = utilities(pool, helped[: count[0]], helpers[: count[1]])
        if self.measured < 1:
            signal = SentenceEmbedding(of="both")
            known, errors = guessed(known, measure(pool, signal, helped), measure(pool, signal, helpers), pool.seed)
            told = (f"their mean squared error is {errors[0]:.2g} on measured pairs that did not teach, and {errors[1]:.2g} with a plain mean"
                    if np.isfinite(errors[0]) else "too few pairs are measured to tell how well")  # fmt: skip
            pool.notes.append(f"most utilities of {len(helpers):,} examples for {len(helped):,} records are guessed; {told}")
            known[_keys(helped)[:, None] == _keys(helpers)] = np.nan
        return np.nan_to_num(minimum_maximum(known), nan=0.0)


def _keys(records: list[Record]) -> Array:
    return np.array([record.key for record in records], dtype="S64")


class GuessedUtility(InContextUtility):
    """The same, most of the pairs guessed by a small network."""

    name: ClassVar[str] = "nn_cift"
    paper: ClassVar[str] = "Data Valuation using Neural Networks for Efficient Instruction Fine-Tuning, 2025, arXiv 2502.09969"
    summary: ClassVar[str] = "In-context utility of a tenth of the pairs, the rest guessed by a small network from embeddings."
    departs: ClassVar[str] = (
        "The measured records are drawn at random (the code takes the first); embeddings are all-MiniLM-L6-v2's. The network has 64 "
        "hidden units (the code: 100), learns utilities of mean 0 and variance 1 at a rate of 1e-3 in batches of 256 (1e-4, 64), at most "
        "60 epochs (20), and stops by the pairs held out (by the loss in training). The example is a turn of the same conversation; pairs "
        "of equal records, and those measured that do not fit, are 0 on the scale of the others."
    )

    measured: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the pool whose pairs are measured; the rest is guessed from embeddings."""
    most: Annotated[int, Field(gt=0)] = 10_000
    """Larger pools are refused: pairs grow with the square (10,000 records: 0.8 GB, several times over)."""
