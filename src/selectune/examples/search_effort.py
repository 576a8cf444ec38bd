"""How long must a model search until it is right? That is how hard a record is.

Knows: how answers are asked for until one is right, or how a tree of solution steps is searched, and how many tries each took. Does not know: who
answers, or how an answer is found in a text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from selectune.data.records import Message, Record
from selectune.evaluation.target import answers_match
from selectune.examples.factors.asking import final, put, question, questions_only, same
from selectune.examples.method import Array, Ranked
from selectune.examples.pool import Pool
from selectune.inference.responder import Asking, Responder, responder

STEP = "Solve the task one step at a time. Write only the next step, in one line. When the task is solved, write instead: Answer: ANSWER"
ATTEMPTS, DEPTHS = 1000, 100
"""Seeds are so far apart, whatever is set: how far a search may go does not change what is drawn on the way."""
_ANSWERED = re.compile(r"(?i)\banswer(?:\s+is|:)|####|\\boxed")


@dataclass
class Node:
    """A beginning of a solution."""

    steps: tuple[str, ...] = ()
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    visits: int = 0


@dataclass(frozen=True)
class Search:
    """How answers are asked for."""

    responder: Responder
    attempts: int
    temperature: float
    tokens: int
    seed: int
    branches: int = 3
    longest: int = 10
    """Steps of a solution."""

    def answers(self, records: list[Record]) -> Array:
        """Return the number of the first right answer of each record, ``(records,)``; one more than ``attempts`` where none is."""
        needed = np.full(len(records), self.attempts + 1)
        for attempt in range(self.attempts):
            open_ = np.flatnonzero(needed > self.attempts).tolist()
            said = self._ask([list(_asked(records[number])) for number in open_], attempt, 0)
            for number, (answer,) in zip(open_, said, strict=True):
                if right(records[number], answer):
                    needed[number] = attempt + 1
        return needed

    def tree(self, records: list[Record]) -> Array:
        """Return the iteration of a Monte-Carlo tree search that first met each record's answer, ``(records,)``; one more than ``attempts`` without.

        An iteration goes down to the leaf that the upper confidence bound prefers, adds branches to it, and follows one of them to an answer. The
        search ends with the first right answer, so no branch has a value before, and the bound prefers the branch that was visited least.
        """
        needed = np.full(len(records), self.attempts + 1)
        roots = [Node() for _ in records]
        for attempt in range(self.attempts):
            open_ = np.flatnonzero(needed > self.attempts).tolist()
            leaves = {number: _least_visited(roots[number]) for number in open_}
            growing = [number for number in open_ if not self._ended(leaves[number].steps)]
            for number, steps in zip(growing, self._next(records, leaves, growing, attempt, 0, self.branches), strict=True):
                leaf = leaves[number]
                leaf.children = [Node((*leaf.steps, step), leaf) for step in dict.fromkeys(steps)]
                leaves[number] = leaf.children[0]
            ends = {number: Node(leaves[number].steps) for number in open_}
            for depth in range(1, self.longest + 1):
                walking = [number for number in open_ if not self._ended(ends[number].steps)]
                for number, (step,) in zip(walking, self._next(records, ends, walking, attempt, depth, 1), strict=True):
                    ends[number].steps = (*ends[number].steps, step)
            for number in open_:
                if right(records[number], "\n".join(ends[number].steps)):
                    needed[number] = attempt + 1
                above: Node | None = leaves[number]
                while above is not None:
                    above.visits += 1
                    above = above.parent
        return needed

    def _ended(self, steps: tuple[str, ...]) -> bool:
        return len(steps) >= self.longest or bool(steps and _ANSWERED.search(steps[-1]))

    def _next(
        self, records: list[Record], at: dict[int, Node], numbers: list[int], attempt: int, depth: int, samples: int
    ) -> list[list[str]]:
        """Return the next steps of some records' solutions."""
        prompts = [[Message("system", STEP), *_with_steps(records[number], at[number].steps)] for number in numbers]
        return [[_first_line(text) for text in texts] for texts in self._ask(prompts, attempt, depth, samples)]

    def _ask(self, prompts: list[list[Message]], attempt: int, depth: int, samples: int = 1) -> list[list[str]]:
        if not prompts:
            return []
        seed = (self.seed * ATTEMPTS + attempt) * DEPTHS + depth
        return self.responder.answers(
            prompts, samples=samples, temperature=self.temperature, max_new_tokens=self.tokens, seed=seed
        )


def right(record: Record, text: str) -> bool:
    """Whether a text ends in a record's answer; of choices, in the same one, by its words or its letter."""
    return same(record, final(text), record.response) if record.choices else answers_match(text, record.response)


def _asked(record: Record) -> tuple[Message, ...]:
    """Return a record's conversation up to its question, with the choices."""
    return put(record, question(record))


def _least_visited(root: Node) -> Node:
    """Return the leaf that is reached by taking the least visited branch each time, the first of several."""
    node = root
    while node.children:
        node = min(node.children, key=lambda child: child.visits)
    return node


def _with_steps(record: Record, steps: tuple[str, ...]) -> list[Message]:
    """Return a record's prompt, with the steps so far under its question."""
    turns = [message for message in _asked(record) if message.role != "system"]
    if not steps:
        return turns
    return [*turns[:-1], Message(turns[-1].role, turns[-1].content + "\n\nSteps so far:\n" + "\n".join(steps))]


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


class SearchEffort(Ranked, Asking):
    """The records that a model must try longest to answer, and those that it never does."""

    name: ClassVar[str] = "search_effort"
    family: ClassVar[str] = "quality"
    paper: ClassVar[str] = (
        "SoTA with Less: MCTS-Guided Sample Selection for Data-Efficient Visual Reasoning Self-Improvement, 2025, arXiv 2504.07934"
    )
    summary: ClassVar[str] = "The records whose answer takes a model most tries to find, by sampling answers or by tree search."
    departs: ClassVar[str] = (
        "Text instead of pictures; answers are matched, not judged by a model; the budget takes the hardest instead of those beyond five iterations. "
        "Tries are sampled answers unless the tree search is asked for. Unsolved records stay, as in the paper; its code drops them. "
        "All that a model could say is drawn from, by temperature alone (the paper: top-p 0.9)."
    )

    how: Literal["answers", "search"] = "answers"
    """Whole answers until one is right, or a tree search over solution steps (several times as dear)."""
    attempts: Annotated[int, Field(gt=0)] = 16
    """Answers, or iterations of the search (the paper: 50)."""
    temperature: Annotated[float, Field(ge=0)] = 0.5
    """Of what is drawn."""
    answer_tokens: Annotated[int, Field(gt=0)] = 256
    """Of an answer, or of a step."""
    unsolved: Literal["first", "last"] = "first"
    """Where records come that were never answered rightly."""

    def score(self, pool: Pool) -> dict[str, Array]:
        questions_only(pool.records, self.name)
        each = dict(sorted(zip(pool.keys, pool.records, strict=True), key=lambda pair: pair[0]))
        search = Search(responder(self, pool), self.attempts, self.temperature, self.answer_tokens, pool.seed)
        found = (search.answers if self.how == "answers" else search.tree)(list(each.values()))
        tries = dict(zip(each, found.tolist(), strict=True))
        needed = np.array([tries[key] for key in pool.keys], dtype=np.float64)
        never = needed > self.attempts
        if never.all():
            pool.notes.append(f"no record was answered rightly within {self.attempts} tries: the choice is by chance")
        order = np.where(never, 0.0, needed) if self.unsolved == "last" else needed
        return {"order": order, "tries": needed}
