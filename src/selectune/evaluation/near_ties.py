"""Which decisions rounding could change, and how they are made again.

Knows: questions decided by the best of several scores, as they are and per length, and questions decided by whether a
continuation is the greedy one; how far scores computed twice lie apart. The closest decisions are made again first; what they
show about the rounding noise tells how many more are near-ties, and every further one sharpens the estimate.
Does not know: models, and how scores are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

STANDARD_DEVIATIONS = 5.0
"""A decision is a near-tie when it is closer than this many standard deviations of the noise."""
PROBES = 12
"""Questions of a kind that are decided again whatever they look like, the closest ones."""
LEAST_NOISE = 1e-4
"""In nats, the noise that is always reckoned with."""


class Score(NamedTuple):
    """What is known of one pair of context and continuation."""

    total: float
    """Sum of the log-probabilities."""
    margin: float
    """The smallest lead of a token over all other words, in logits: below zero, the continuation is not the greedy one."""

    @property
    def greedy(self) -> bool:
        """Whether the continuation is the greedy one."""
        return self.margin > 0


class NearTies:
    """The decisions of a set of questions.

    Args:
        questions: the pairs of each question. tokens: of each pair's continuation. lengths: of the continuations' texts, where
            scores are compared per length too.
    """

    def __init__(self, questions: Sequence[Sequence[int]], tokens: Sequence[int], lengths: Sequence[int] | None = None) -> None:
        self._questions, self._tokens = questions, tokens
        self._scales: list[Callable[[int], float]] = [lambda index: 1.0]
        if lengths is not None:
            self._scales.append(lambda index: float(max(lengths[index], 1)))
        self.again: set[int] = set()
        """Numbers of the questions that were decided again."""

    def settle(self, fast: list[Score], exactly: Callable[[list[int]], dict[int, Score]]) -> list[Score]:
        """Return scores that decide as exact ones would.

        Args:
            fast: the rounded scores of all pairs. exactly: scores some pairs without rounding.
        """
        exact: dict[int, Score] = {}
        for kind in (True, False):
            numbers = [n for n, members in enumerate(self._questions) if (len(members) > 1) == kind]
            numbers.sort(key=lambda n: self._closeness(self._questions[n], fast))
            asked = [index for n in numbers[:PROBES] for index in self._questions[n]]
            while asked:
                exact.update(exactly(asked))
                bound = STANDARD_DEVIATIONS * self._noise([self._questions[n] for n in numbers], fast, exact)
                close = [index for n in numbers for index in self._contenders(self._questions[n], fast, bound)]
                asked = [index for index in close if index not in exact]
        settled = list(fast)
        for number, members in enumerate(self._questions):
            known = [index for index in members if index in exact]
            if not known:
                continue
            self.again.add(number)
            moved = sum(exact[index].total - fast[index].total for index in known) / len(known)
            for index in members:  # what cannot win moves with those that can: what they share moved them all
                settled[index] = exact.get(index) or Score(fast[index].total + moved, fast[index].margin)
        return settled

    def _gaps(self, members: Sequence[int], scores: Sequence[Score]) -> Iterator[tuple[int, int, float]]:
        """Yield the best pair, another one, and by how much it is better, in units of the noise of one token."""
        for scale in self._scales:
            best = max(members, key=lambda index: scores[index].total / scale(index))
            for other in members:
                if other != best:
                    gap = scores[best].total / scale(best) - scores[other].total / scale(other)
                    unit = self._tokens[best] / scale(best) ** 2 + self._tokens[other] / scale(other) ** 2
                    yield best, other, gap / unit**0.5

    def _closeness(self, members: Sequence[int], scores: Sequence[Score]) -> float:
        if len(members) == 1:
            return abs(scores[members[0]].margin)
        return min(gap for _, _, gap in self._gaps(members, scores))

    def _contenders(self, members: Sequence[int], scores: Sequence[Score], bound: float) -> list[int]:
        """Return the pairs of a question between which rounding could decide."""
        if len(members) == 1:
            return [index for index in members if abs(scores[index].margin) < bound]
        close = [(best, other) for best, other, gap in self._gaps(members, scores) if gap < bound]
        return sorted({index for two in close for index in two})

    def _noise(self, questions: list[Sequence[int]], fast: Sequence[Score], exact: dict[int, Score]) -> float:
        """Return the root mean square by which rounding moved what decides: differences per token, or leads of greedy tokens."""
        moved = []
        for members in questions:
            known = [index for index in members if index in exact]
            if len(members) == 1:
                moved += [(exact[index].margin - fast[index].margin) ** 2 for index in known]
            for one, other in combinations(known, 2):
                gap = exact[one].total - fast[one].total - exact[other].total + fast[other].total
                moved.append(gap**2 / (self._tokens[one] + self._tokens[other]))
        return max((sum(moved) / len(moved)) ** 0.5 if moved else 0.0, LEAST_NOISE)
