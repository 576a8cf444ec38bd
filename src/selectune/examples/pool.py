"""What a method of choosing examples may ask for.

Knows: the pool of records, each with its place and its size; the target's records; the base, loaded when it is first asked for; and where
signals are kept, so that a record is measured once. Does not know: any signal or method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from selectune.data.records import Record
from selectune.meter import Meter

if TYPE_CHECKING:
    from selectune.inference.remembering import Rehearsal
    from selectune.models import Base


@dataclass
class Pool:
    """Records to choose from, and what choosing may use.

    Equal records are one and the same to every signal: what is known of a record follows from its content alone, never from its place.
    """

    records: Sequence[Record]
    load_base: Callable[[], Base]
    """Gives the base; called once, and only by methods that need it."""
    make_encoder: Callable[[Any], Any]
    """From the base's tokenizer to the encoder of records."""
    target: Sequence[Record] = ()
    """Records of the target: what the specialist should be good at."""
    seed: int = 0
    meter: Meter = field(default_factory=lambda: Meter("choose examples"))
    bfloat16: bool = False
    quiet: bool = False
    folder: Path | None = None
    """Where signals are kept as they come; left out: in memory only."""
    library: Path | None = None
    """Where signals of this base and seed are kept for several choices, instead of in ``folder``: what another choice measured is not
    measured again, and its cost is counted as if it were."""
    charged: dict[Path, np.ndarray] = field(default_factory=dict)
    """Of each part of the library: which of its values were counted already, ``(values,)`` bool."""
    engine: Literal["local", "ray"] = "local"
    """Where signals are measured: in this process, or on the machines of a Ray cluster."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of the choice, a sentence each."""
    rehearsal: Rehearsal | None = None
    """Counts what a method would ask a model, instead of asking it."""

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def base(self) -> Base:
        """The base model."""
        return self.load_base()

    @cached_property
    def encoder(self) -> Any:
        """What turns records into the base's tokens."""
        return self.make_encoder(self.base.tokenizer)

    @cached_property
    def keys(self) -> list[str]:
        """The hash of each record's content."""
        return [record.key for record in self.records]

    @cached_property
    def order(self) -> np.ndarray:
        """Places in the order in which ties are broken: by content, then by place; ``(records,)`` int64."""
        return np.array(sorted(range(len(self.records)), key=lambda place: (self.keys[place], place)), dtype=np.int64)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Trained tokens of each record as the base reads it, ``(records,)`` int64."""
        known: dict[str, int] = {}
        for key, record in zip(self.keys, self.records, strict=True):
            if key not in known:
                known[key] = sum(sum(label != -100 for label in piece.labels[1:]) for piece in self.encoder.encode(record))
        return np.array([known[key] for key in self.keys], dtype=np.int64)

    def of(self, records: Sequence[Record]) -> Pool:
        """Return a pool of other records, with the same base and target."""
        return replace(self, records=records, load_base=lambda: self.base, make_encoder=lambda words: self.encoder)

    def context(self, records: Sequence[Record] | None = None) -> Any:
        """Return what a trial of training asks for (see :mod:`selectune.parameters.factors.trial`), over some records."""
        from selectune.parameters import Context

        train = list(self.records if records is None else records)
        return Context(
            self.base, self.encoder, train, list(self.target), self.torch_generator(), self.meter, self.bfloat16, self.quiet
        )

    def worker(self, model: Any = None) -> Any:
        """Return what measures records with the base, or with a model that was trained from it."""
        from selectune.examples.factors.signals import Worker

        base = self.base if model is None else replace(self.base, model=model)
        return Worker(base, self.encoder, self.bfloat16, self.seed, self.meter)

    def generator(self, purpose: str = "") -> np.random.Generator:
        """Return a generator that depends on the seed and a purpose only."""
        return np.random.default_rng([self.seed, *purpose.encode()])

    def uniform(self, purpose: str = "") -> np.ndarray:
        """Return a uniform number for each record that depends on its content, the seed and nothing else (not on the pool's order).

        Equal records, by their place among each other, get different ones.
        """
        drawn = self.generator(purpose).random(len(self.records))
        spread = np.empty(len(self.records))
        spread[self.order] = drawn
        return spread

    def torch_generator(self) -> torch.Generator:
        """Return a seeded torch generator."""
        return torch.Generator().manual_seed(self.seed)
