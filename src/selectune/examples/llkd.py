"""Questions that a teacher answers with certainty and the student does not.

Knows: how sure a model is of an answer (its likelihood among the labels, or how often it is given), thresholds that follow both certainties batch by
batch and label by label, and a student that learns between batches. Does not know: who the teacher is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from selectune.data.records import Record
from selectune.examples.factors.asking import alike, answered, final, put, question, questions_only
from selectune.examples.factors.learnt import Learnt
from selectune.examples.factors.likely_labels import OfLabels, turns
from selectune.examples.factors.store import measure
from selectune.examples.method import Array, Choice, ExampleMethod
from selectune.examples.pool import Pool
from selectune.inference.local import LocalResponder
from selectune.inference.responder import Asking, Responder, kept_in, responder

Sure = tuple[list[str], Array, Array]
"""An answer to each record, its probability, and the entropy of all that could be said over the greatest possible; ``(records,)`` in [0, 1]."""


@dataclass
class Thresholds:
    """What a certainty must reach, for each label; both follow the batches as running means.

    A label on which the teacher has been less sure than on the surest one has a lower threshold, in proportion; so has one on which the student
    has been less unsure.
    """

    momentum: float
    means: list[float] = field(default_factory=list)
    """Of the teacher's confidence and of the student's uncertainty."""
    by_label: list[dict[str, float]] = field(default_factory=lambda: [{}, {}])

    def passes(self, confidence: Array, uncertainty: Array, labels: list[str]) -> Array:
        """Take a batch in, and return which of its records reach both thresholds, ``(batch,)`` bool."""
        kept = np.ones(len(labels), dtype=bool)
        first = not self.means
        for which, values in enumerate((confidence, uncertainty)):
            self._follow(which, values, labels, first)
            most = max(self.by_label[which].values())
            limits = [self.means[which] * (self.by_label[which][label] / most if most > 0 else 1.0) for label in labels]
            kept &= values >= np.array(limits) - 1e-12
        return kept

    def _follow(self, which: int, values: Array, labels: list[str], first: bool) -> None:
        def mixed(old: float | None, new: float) -> float:
            return new if old is None else self.momentum * old + (1 - self.momentum) * new

        if first:
            self.means.append(float(values.mean()))
        else:
            self.means[which] = mixed(self.means[which], float(values.mean()))
        for label in sorted(set(labels)):
            own = float(values[[one == label for one in labels]].mean())
            self.by_label[which][label] = mixed(self.by_label[which].get(label), own)


class LearningWithLess(Asking, ExampleMethod):
    """Questions with a teacher's answers: those that it is sure of and the student is not."""

    name: ClassVar[str] = "llkd"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = (
        "Learning with Less: Knowledge Distillation from Large Language Models via Unlabeled Data, NAACL Findings 2025, arXiv 2411.08028"
    )
    summary: ClassVar[str] = (
        "A teacher answers; kept is what it is sure of and the base, as it learns, is not (adaptive thresholds by label)."
    )
    departs: ClassVar[str] = (
        "Chosen before training: the student is a copy of the base that learns a little between parts of the pool. Uncertainty is the "
        "entropy over its greatest possible value; how the paper moves thresholds by label and forms its weights is not known for sure: here by "
        "the ratio to the surest label, where all records have the same choices, and the product of both signals. Where there is no closed "
        "set of labels, and of a teacher at an endpoint, answers are drawn several times and their shares are the probabilities. Where nothing "
        "of a part of the pool passes, its best quarter does. What passes comes first, the heaviest before. In "
        "training the weights, on average 1, multiply the losses of a record's tokens."
    )
    changes: ClassVar[bool] = True

    shots: Annotated[int, Field(ge=0)] = 3
    """Records of the target that the teacher sees answered, where there are any."""
    samples: Annotated[int, Field(gt=1)] = 5
    """Answers that are drawn where probabilities cannot be had."""
    longest: Annotated[int, Field(gt=0)] = 48
    """Tokens of such an answer."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of the thresholds."""
    batch: Annotated[int, Field(gt=0)] = 32
    """Records after which the thresholds move."""
    rounds: Annotated[int, Field(gt=0)] = 2
    """Parts of the pool; after each but the last the student learns what was kept so far."""
    steps: Annotated[int, Field(gt=0)] = 30
    """Of the student's training between parts."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Of that training."""

    def choose(self, pool: Pool) -> Choice:
        questions_only(pool.records, self.name)
        said, confidence, _ = self._teacher(pool)
        anew = [answered(record, text) for record, text in zip(pool.records, said, strict=True)]
        records = [record if new is None else new for record, new in zip(pool.records, anew, strict=True)]
        confidence[[new is None for new in anew]] = 0.0
        drawn = pool.uniform(self.name)
        order = sorted(pool.order.tolist(), key=lambda place: drawn[place])
        uncertainty, kept = np.zeros(len(pool)), np.zeros(len(pool), dtype=bool)
        thresholds, student = Thresholds(self.momentum), Learnt(pool, 0, self.learning_rate, [])
        closed = all(record.choices and set(record.choices) == set(pool.records[0].choices) for record in pool.records)
        for number, part in enumerate(np.array_split(order, self.rounds)):
            if not len(part):
                continue
            if number and kept.any():
                known = sorted((records[place] for place in np.nonzero(kept)[0].tolist()), key=lambda record: record.key)
                student = Learnt(pool, self.steps, self.learning_rate, known)
            uncertainty[part] = self._student(pool, student, [pool.records[place] for place in part.tolist()])
            for start in range(0, len(part), self.batch):
                some = part[start : start + self.batch]
                labels = [said[place] if closed else "" for place in some.tolist()]
                kept[some] = thresholds.passes(confidence[some], uncertainty[some], labels) & (confidence[some] > 0)
            if not kept[part].any():  # no student learns from nothing
                best = sorted(part[confidence[part] > 0].tolist(), key=lambda place: -confidence[place] * uncertainty[place])
                kept[best[: -(-len(part) // 4)]] = True
        weight = confidence * uncertainty
        places = self.fill(pool, sorted(order, key=lambda place: (not kept[place], -weight[place])), pool.of(records))
        pool.notes.append(f"{int(kept.sum()):,} of {len(pool):,} questions are sure to the teacher and not to the student")
        chosen = weight[places]
        return Choice(
            places,
            {
                "weight": weight,
                "teacher's confidence": confidence,
                "student's uncertainty": uncertainty,
                "kept": kept.astype(np.float64),
            },
            weights=chosen / chosen[chosen > 0].mean() if chosen.any() else np.ones(len(places)),
            records=records,
        )

    # -- two models and how sure they are ----------------------------------------------------------------------------------

    def _teacher(self, pool: Pool) -> Sure:
        made = responder(self, pool)
        if not isinstance(made, LocalResponder):
            asked = tuple((question(record), record.response) for record in self._shown(pool))
            return self._by_draws(made, pool, list(pool.records), asked)
        shots = tuple((record.question, record.response) for record in self._shown(pool))
        teacher = replace(pool, load_base=lambda: made.base, make_encoder=lambda words: made.encoder)
        found = measure(teacher, OfLabels(shots=shots, model=self.by_model or ""))
        return self._filled(made, pool, list(pool.records), found, shots)

    def _shown(self, pool: Pool) -> list[Record]:
        return sorted(pool.target, key=lambda record: record.key)[: self.shots]

    def _student(self, pool: Pool, learnt: Learnt, records: list[Record]) -> Array:
        """Return how unsure the student is of its own answers, ``(records,)``."""
        worker = learnt.worker
        order = sorted(range(len(records)), key=lambda number: records[number].key)
        found = np.full((len(records), 3), np.nan, dtype=np.float32)
        for start in range(0, len(order), 64):
            found[order[start : start + 64]] = OfLabels().measure(worker, [records[n] for n in order[start : start + 64]])
        rehearsal = None if pool.rehearsal is None else type(pool.rehearsal)()  # what the student is asked costs nothing
        made = LocalResponder(worker.base, pool.encoder, pool.meter, kept_in(pool), pool.quiet, rehearsal, learnt.name)
        return self._filled(made, pool, records, found, ())[2]

    def _filled(self, made: Responder, pool: Pool, records: list[Record], found: Array, shots: Any) -> Sure:
        """Return answers and how sure and unsure they are: by the labels' probabilities where there are labels, else by draws."""
        open_ones = [number for number, record in enumerate(records) if not record.choices]
        said = [record.choices[int(best)] if record.choices else "" for record, best in zip(records, found[:, 0], strict=True)]
        sure, unsure = found[:, 1:].astype(np.float64).T
        drawn, shares, spread = self._by_draws(made, pool, [records[number] for number in open_ones], shots)
        for place, number in enumerate(open_ones):
            said[number], sure[number], unsure[number] = drawn[place], shares[place], spread[place]
        return said, sure, unsure

    def _by_draws(self, made: Responder, pool: Pool, records: list[Record], shots: Any) -> Sure:
        prompts = [(*turns(shots), *put(record, question(record))) for record in records]
        drawn = made.answers(prompts, samples=self.samples, temperature=1.0, max_new_tokens=self.longest, seed=pool.seed)
        best = [_most_given(record, [final(text) for text in own]) for record, own in zip(records, drawn, strict=True)]
        shares, spread = np.array([own[1:] for own in best], dtype=np.float64).reshape(-1, 2).T
        return [text for text, *_ in best], shares, spread


def _most_given(record: Record, drawn: list[str]) -> tuple[str, float, float]:
    """Return the first answer of the largest group that is alike, the group's share, and the entropy of all groups' shares over that of answers
    none of which agree; where all are empty: nothing, no share, the greatest entropy."""
    groups = alike(record, drawn)
    if not groups:
        return "", 0.0, 1.0
    alone = len(drawn) - sum(map(len, groups))
    shares = np.array([*map(len, groups), *[1] * alone]) / len(drawn)
    most = max(groups, key=len)
    return drawn[most[0]], len(most) / len(drawn), float(-np.sum(shares * np.log(shares)) / np.log(len(drawn)))
