"""Tags that a model gives to questions, made one where they mean one thing.

Knows: how tags are asked for and read, and how they are merged: by spelling, by meaning, by always coming together. Does not know: what is
chosen by them.

Source: #InsTag, ICLR 2024, arXiv 2308.07074 (its thresholds).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

from selectune.data.records import Message, Record
from selectune.inference.responder import Responder

ASKED = (
    "Name what the following question is about and what it asks to be done, as a few short tags that would fit other questions too. "
    'Reply with a JSON list of strings and nothing else, such as ["unit conversion", "physics", "show the steps"].\n\nQuestion:\n{question}'
)
LONGEST_TAG = 60
"""Characters; what is longer is a sentence and no tag."""


def asked_tags(made: Responder, records: Sequence[Record], characters: int = 4000) -> list[set[str]]:
    """Return each record's tags as a model gives them, of all its user turns together, lower case.

    Args:
        characters: of a turn that are shown.
    """
    turns = [
        (number, message.content)
        for number, record in enumerate(records)
        for message in record.prompt or (Message("user", record.text),)
        if message.role == "user"
    ]
    prompts = [[Message("user", ASKED.format(question=text[:characters]))] for _, text in turns]
    found: list[set[str]] = [set() for _ in records]
    for (number, _), (said,) in zip(turns, made.answers(prompts, max_new_tokens=96), strict=True):
        found[number] |= read_tags(said)
    return found


def read_tags(said: str) -> set[str]:
    """Return the tags of an answer: a JSON list, or else lines, commas or semicolons; spelled in lower case without symbols."""
    listed = re.search(r"\[.*\]", said, re.DOTALL)
    try:
        given = json.loads(listed[0]) if listed else re.split(r"[\n,;]", said)
    except ValueError:
        given = re.split(r"[\n,;]", said)
    words = [one.get("tag", "") if isinstance(one, dict) else one for one in given]
    plain = {" ".join(re.findall(r"\w+", word.lower())) for word in words if isinstance(word, str) and len(word) <= LONGEST_TAG}
    return {word for word in plain if re.search(r"[^\W\d_]", word)}


def merged(
    tagged: list[set[str]], least: int, distance: float = 0.05, support: int = 40, confidence: float = 0.99
) -> list[set[str]]:
    """Return tags without rare ones, and one instead of several that mean the same or always come together.

    Args:
        least: records that a tag must have. distance: cosine distance of tags that mean one thing (clusters are found by DBSCAN). support:
            records in which two tags must come together, confidence: share of the rarer one's, for the more frequent to stand for both.
    """
    tagged = _frequent(tagged, least)
    tagged = _renamed(tagged, _by_meaning(tagged, distance))
    return _renamed(tagged, _by_company(tagged, support, confidence))


def _counts(tagged: list[set[str]]) -> Counter[str]:
    return Counter(tag for own in tagged for tag in own)


def _frequent(tagged: list[set[str]], least: int) -> list[set[str]]:
    counts = _counts(tagged)
    return [{tag for tag in own if counts[tag] >= least} for own in tagged]


def _renamed(tagged: list[set[str]], names: dict[str, str]) -> list[set[str]]:
    return [{names.get(tag, tag) for tag in own} for own in tagged]


def _by_meaning(tagged: list[set[str]], distance: float) -> dict[str, str]:
    from sklearn.cluster import DBSCAN

    from selectune.models.sentence_encoder import sentence_encoder

    counts = _counts(tagged)
    words = sorted(counts, key=lambda tag: (-counts[tag], tag))
    if len(words) < 2:
        return {}
    groups = DBSCAN(eps=distance, min_samples=1, metric="cosine").fit_predict(sentence_encoder().embed(words))
    first: dict[int, str] = {}
    return {word: first.setdefault(group, word) for word, group in zip(words, groups.tolist(), strict=True)}


def _by_company(tagged: list[set[str]], support: int, confidence: float) -> dict[str, str]:
    counts = _counts(tagged)
    pairs = Counter(pair for own in tagged for pair in combinations(sorted(own, key=lambda tag: (counts[tag], tag)), 2))
    names: dict[str, str] = {}
    for (rarer, other), together in sorted(pairs.items(), key=lambda item: (counts[item[0][0]], -item[1], item[0])):
        if together >= support and together >= confidence * counts[rarer]:
            names.setdefault(rarer, other)
    for rarer in names:
        while names[rarer] in names:
            names[rarer] = names[names[rarer]]
    return names
