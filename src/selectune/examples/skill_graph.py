"""Records with the skills that matter, and with those that belong together.

Knows: skills of reference records (their telling phrases, or what a model names), the graph of how often each occurs and two occur together, and
a record's score in it. Does not know: how texts become vectors.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from selectune.data.duplicates import content
from selectune.data.records import Message
from selectune.errors import UserError
from selectune.examples.diverse import Embedded
from selectune.examples.factors.normalise import unit
from selectune.examples.factors.signals import asking
from selectune.examples.factors.store import measure
from selectune.examples.method import Array, Choice, ranked
from selectune.examples.pool import Pool
from selectune.inference.responder import Asking, responder

BLOCK = 4096
"""Records that are scored together."""
_ASKED = "Name the skills or pieces of knowledge that this text needs, at most {each}, one a line, a few words each, nothing else.\n\n{text}"


class SkillGraph(Embedded, Asking):
    """The records whose skills, and pairs of skills, weigh most in a graph that was made from the target's records."""

    name: ClassVar[str] = "mass"
    family: ClassVar[str] = "target"
    paper: ClassVar[str] = (
        "MASS: Mathematical Data Selection via Skill Graphs for Pretraining Large Language Models, ICML 2025, arXiv 2503.14917"
    )
    summary: ClassVar[str] = "The highest similarity to the target's skills and to pairs of skills that occur together there."
    departs: ClassVar[str] = (
        "The target's records are the reference. Skills are phrases that are telling of them unless a model names them. The paper adds "
        "similarities up through the graph's adjacency matrix; whether as sums or as products of pairs is not known (its code was never released). "
        "Here a pair counts by the product of both similarities, and a record by its nearest skills alone. Vectors are a "
        "sentence encoder's unless the base's own are asked for."
    )
    needs_target: ClassVar[bool] = True

    vectors: Literal["sentence", "base"] = "sentence"
    """A small sentence encoder's, or the base's own mean hidden state; the name of a skill has no gradient to compare."""
    of: Literal["question", "response", "both"] = "both"
    """Which text is embedded."""
    named_by: Literal["phrases", "model"] = "phrases"
    """Skills are the phrases of one or two words that are telling of a reference record; or what a model names."""
    each: Annotated[int, Field(gt=0)] = 5
    """Skills of a reference record."""
    most: Annotated[int, Field(gt=0)] = 1000
    """Skills in the graph, the most frequent."""
    merged: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Similarity from which two skills are one."""
    nearest: Annotated[int, Field(gt=0)] = 10
    """Skills that a record is counted to have."""
    centre: bool = True
    """Subtract the pool's mean from all vectors."""

    def choose(self, pool: Pool) -> Choice:
        named = self.named(pool)
        counts = Counter(skill for own in named for skill in dict.fromkeys(own))
        if not counts:
            raise UserError("the target's records name no skill", field="examples", expected="records with words in them",
                            mend="give other target records, or named_by: model")  # fmt: skip
        names = sorted(counts, key=lambda skill: (-counts[skill], skill))[: self.most]
        records = self.embed(pool)
        skills = measure(pool, self.signal().model_copy(update={"of": "question"}), [asking(name) for name in names])
        if self.centre:
            mean = records[pool.order].mean(0)
            records, skills = unit(records - mean), unit(skills - mean)
        stands = merged(skills, self.merged)
        kept = np.unique(stands)
        number = dict(zip(names, np.searchsorted(kept, stands).tolist(), strict=True))
        single, pairs = graph([{number[skill] for skill in own if skill in number} for own in named], len(kept))
        scores = np.concatenate([
            score(has(records[start : start + BLOCK] @ skills[kept].T, self.nearest), single, pairs)
            for start in range(0, len(records), BLOCK)
        ])  # fmt: skip
        pool.notes.append(f"{len(kept):,} skills, the most frequent: {', '.join(names[place] for place in kept[:8].tolist())}")
        return Choice(self.fill(pool, ranked(pool, scores)), {"skill score": scores})

    def named(self, pool: Pool) -> list[list[str]]:
        """Return the skills of each reference record."""
        if self.named_by == "phrases":
            return telling_phrases([content(record) for record in pool.target], map(content, pool.records), self.each)
        prompts = [(Message("user", _ASKED.format(each=self.each, text=content(record)[:2000])),) for record in pool.target]
        return [
            listed(answers[0], self.each) for answers in responder(self, pool).answers(prompts, max_new_tokens=16 * self.each)
        ]


def telling_phrases(texts: Sequence[str], others: Iterable[str], each: int) -> list[list[str]]:
    """Return the phrases of one or two words that tell each text from all others: frequent in it, and made of words that few texts have.

    A phrase weighs its count times the least inverse document frequency of its words. Phrases of a single text are left out where that leaves
    any. Ties by the alphabet.
    """
    found = [_phrases(text) for text in texts]
    within = Counter(phrase for own in found for phrase in own)
    documents, total = Counter(within), len(texts)
    for text in others:
        documents.update({word for word, _ in _words(text)})
        total += 1
    chosen = []
    for own in found:
        able = {phrase: count for phrase, count in own.items() if within[phrase] > 1} or own
        weight = {
            phrase: count * min(math.log((1 + total) / documents[word]) for word in phrase.split())
            for phrase, count in able.items()
        }
        chosen.append(sorted(weight, key=lambda phrase: (-weight[phrase], phrase))[:each])
    return chosen


def _phrases(text: str) -> Counter[str]:
    words = _words(text)
    pairs = Counter(f"{one} {other}" for (one, able), (other, also) in pairwise(words) if able and also)
    return Counter(word for word, able in words if able) + pairs


def _words(text: str) -> list[tuple[str, bool]]:
    """Return a text's words, and whether each can name something: those of one or two letters cannot."""
    words = re.findall(r"[^\W\d_]\w*", text.lower())
    return [(word, len(word) > 2 or not word.isascii()) for word in words]


def listed(answer: str, each: int) -> list[str]:
    """Return the items of a list that a model wrote, one a line, without bullets and numbers, lower case."""
    lines = (re.sub(r"^[\s\-*•\d.)]+", "", line).strip(" .:;").lower() for line in answer.splitlines())
    return list(dict.fromkeys(line for line in lines if line and len(line.split()) <= 8))[:each]


def merged(vectors: Array, likeness: float) -> Array:
    """Return of each unit vector the place that stands for it: its own, or the first before it, itself standing for others, that is as like."""
    standing: list[int] = []
    found = np.empty(len(vectors), dtype=np.int64)
    for place, vector in enumerate(vectors):
        near = np.flatnonzero(vectors[standing] @ vector >= likeness - 1e-6) if standing else np.empty(0, np.int64)
        found[place] = standing[int(near[0])] if len(near) else place
        if not len(near):
            standing.append(place)
    return found


def graph(tagged: Sequence[set[int]], count: int) -> tuple[Array, Array]:
    """Return how often each skill occurs, ``(skills,)``, and two occur together, ``(skills, skills)`` without a diagonal; each adds up to 1.

    Args:
        tagged: of each record, the numbers of its skills. count: skills.
    """
    single, pairs = np.zeros(count), np.zeros((count, count))
    for own in tagged:
        places = sorted(own)
        single[places] += 1
        pairs[np.ix_(places, places)] += 1
    np.fill_diagonal(pairs, 0)
    return single / max(single.sum(), 1), pairs / max(pairs.sum(), 1)


def has(likeness: Array, nearest: int) -> Array:
    """Return which skills records have, and how much: positive similarities, the nearest few of each record; ``(records, skills)``."""
    found = np.maximum(likeness, 0).astype(np.float64)
    if nearest < found.shape[1]:
        least = np.partition(found, -nearest, axis=1)[:, -nearest]
        found[found < least[:, None]] = 0
    return found


def score(skills: Array, single: Array, pairs: Array) -> Array:
    """Return ``sum_i single_i s_i + sum_ij pairs_ij s_i s_j`` of each record, ``(records,)``."""
    return skills @ single + ((skills @ pairs) * skills).sum(1)
