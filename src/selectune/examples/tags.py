"""Records by what they are about: tags, and choices in which every tag is there.

Knows: tags made without a tagger (clusters at several scales, what is asked for, the answer's format), complexity and diversity by tags, and
complexity-first diverse sampling; strata of skills and styles; rare tags first. Does not know: what tags mean, or how a model is asked for them.
"""

from __future__ import annotations

import re
from itertools import cycle, islice
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from selectune.data.records import Record
from selectune.examples.diverse import Embedded
from selectune.examples.factors.strata import fair_shares, k_means, members, round_robin
from selectune.examples.factors.tagging import asked_tags, merged
from selectune.examples.method import Array, Choice, ranked
from selectune.examples.pool import Pool
from selectune.inference.responder import Asking, responder

_STYLES = (("code", r"```|def |SELECT |#include"), ("steps", r"(?m)^\s*(\d+[.)]|step \d)"), ("list", r"(?m)^\s*[-*•] "),
           ("number", r"\d"), ("question", r"\?\s*$"))  # fmt: skip


def style(record: Record) -> list[str]:
    """Return the forms that a response has: code, steps, list, number, question; and how long it is."""
    found = [name for name, pattern in _STYLES if re.search(pattern, record.response)]
    words = len(record.response.split())
    return [*found, "short" if words < 12 else "long" if words > 150 else "middle"]


def asked(record: Record) -> str:
    """Return the first two words of what is asked, lower case."""
    return " ".join(re.findall(r"[^\W\d_]+", record.question.lower())[:2])


def tags(pool: Pool, vectors: Array, scales: tuple[int, ...], least: int) -> list[set[str]]:
    """Return each record's tags; those of fewer than ``least`` records are dropped."""
    found = [{f"asks: {asked(record)}", *(f"form: {one}" for one in style(record))} for record in pool.records]
    for scale in scales:
        labels, _ = k_means(vectors, scale, pool.seed, pool.order)
        for own, label in zip(found, labels.tolist(), strict=True):
            own.add(f"group {label} of {scale}")
    counts: dict[str, int] = {}
    for own in found:
        for tag in own:
            counts[tag] = counts.get(tag, 0) + 1
    return [{tag for tag in own if counts[tag] >= least} for own in found]


def complexity_first(tagged: list[set[str]], order: Array, count: int) -> list[int]:
    """Return places: those with most tags first, each bringing a tag that the pass has not met; pass after pass."""
    rest = sorted((place for place in order.tolist() if tagged[place]), key=lambda place: -len(tagged[place]))
    chosen: list[int] = []
    while rest and len(chosen) < count:
        met: set[str] = set()
        left = []
        for place in rest:
            if len(chosen) < count and not tagged[place] <= met:
                met |= tagged[place]
                chosen.append(place)
            else:
                left.append(place)
        rest = left
    return chosen


class Tagged(Asking, Embedded):
    """Many tags first, and every tag there."""

    name: ClassVar[str] = "instag"
    paper: ClassVar[str] = (
        "#InsTag: Instruction Tagging for Analyzing Supervised Fine-tuning of Large Language Models, ICLR 2024, arXiv 2308.07074"
    )
    summary: ClassVar[str] = "Complexity-first diverse sampling over tags."
    departs: ClassVar[str] = (
        "Unless a model is asked, tags are clusters at three scales, the question's first words and the answer's form. Asked tags are not stemmed, "
        "and rules between pairs of them, the surest first, stand for those of FP-growth. "
        "Records without tags, which the paper never takes, fill a budget that is larger than the tagged ones."
    )

    tagger: Literal["form", "model"] = "form"
    """``model``: a model gives the tags (so it does where an endpoint or another model is named)."""
    scales: tuple[Annotated[int, Field(gt=0)], ...] = (8, 32, 128)
    """Numbers of clusters that give a tag each."""
    least: Annotated[int, Field(gt=0)] = 2
    """Records that a tag must have (the paper, for hundreds of thousands: 20)."""

    def choose(self, pool: Pool) -> Choice:
        if self.tagger == "model" or self.by_endpoint or self.by_model:
            tagged = merged(asked_tags(responder(self, pool), pool.records), self.least)
        else:
            tagged = tags(pool, self.embed(pool), self.scales, self.least)
        chosen = complexity_first(tagged, pool.order, self.needed(pool))
        kept = set(chosen)
        rest = [place for place in pool.order.tolist() if place not in kept]
        signals = {"tags": np.array([len(own) for own in tagged], dtype=np.float64)}
        return Choice(self.fill(pool, [*chosen, *rest]), signals)


class Strata(Embedded):
    """The best of every skill in every style."""

    name: ClassVar[str] = "skills_and_styles"
    paper: ClassVar[str] = (
        "Cream of the Crop: Harvesting Rich, Scalable and Transferable Multi-Modal Data, 2025, arXiv 2503.13383"
    )
    summary: ClassVar[str] = (
        "For each skill (group of questions) the most typical records, evenly over answer styles, rare styles first."
    )
    departs: ClassVar[str] = (
        "Skills are clusters, so that a record has one, a score is closeness to the centre, styles are found by form: no scoring model. Shares "
        "are of records; for a budget of tokens skills take turns, and styles within them."
    )

    clusters: Annotated[int, Field(gt=0)] = 8
    """Skills."""

    def choose(self, pool: Pool) -> Choice:
        vectors = self.embed(pool)
        labels, centres = k_means(vectors, self.clusters, pool.seed, pool.order)
        closeness = (vectors * centres[labels]).sum(1)
        forms = [set(style(record)) - {"short", "middle", "long"} or {"plain"} for record in pool.records]
        ranking = ranked(pool, closeness)
        skills = members(labels, ranking)
        shares = fair_shares([len(skill) for skill in skills], self.about(pool))
        chosen = [best_of_styles(skill.tolist(), forms, share) for skill, share in zip(skills, shares, strict=True)]
        places = round_robin(chosen, shares).tolist()
        kept = set(places)
        rest = [place for place in ranking.tolist() if place not in kept]
        return Choice(self.fill(pool, [*places, *rest]), {"closeness": closeness, "skill": labels.astype(np.float64)})


def best_of_styles(ranking: list[int], forms: list[set[str]], share: int) -> Array:
    """Return so many places of a ranking, evenly over styles in turn; the rarest style takes first, and what it lacks goes to the others.

    A record with several styles serves one of them.

    Args:
        forms: the styles of each record of the pool, at least one.
    """
    groups: dict[str, list[int]] = {}
    for place in ranking:
        for form in sorted(forms[place]):
            groups.setdefault(form, []).append(place)
    served: dict[str, list[int]] = {form: [] for form in sorted(groups, key=lambda form: (len(groups[form]), form))}
    left, free = share, set(ranking)
    while left and free:
        open_ = [form for form in served if not free.isdisjoint(groups[form])]
        for done, form in enumerate(open_):
            best = [place for place in groups[form] if place in free][: left // (len(open_) - done)]
            served[form] += best
            free.difference_update(best)
            left -= len(best)
    return round_robin([np.array(own, dtype=np.int64) for own in served.values()], [len(own) for own in served.values()])


def quotas_filled(vectors: Array, rare_first: list[Array], budget: int, seed: int) -> list[int]:
    """Return places: of each tag an equal quota, the records nearest to its clusters' centres; the quota rises until the budget is used up.

    A tag has as many clusters as its quota; those in which a record is chosen already are passed over. A record counts for all its tags. After
    each rise every tag has its quota, or all of its records; the last may go beyond the budget.

    Args:
        vectors: ``(records, d)``. rare_first: the places of each tag's records, the rarest tag first.
    """
    chosen: list[int] = []
    kept = np.zeros(len(vectors), dtype=bool)
    quota = 0
    while len(chosen) < budget and (open_ := [own for own in rare_first if not kept[own].all()]):
        quota += max(1, (budget - len(chosen)) // len(open_))
        for own in open_:
            share = min(quota, len(own))
            wanted = share - int(kept[own].sum())
            if wanted > 0:
                labels, centres = k_means(vectors[own], share, seed)
                served = set(labels[kept[own]].tolist())
                first = sorted(range(len(centres)), key=lambda cluster: cluster in served)
                for cluster in islice(cycle(first), wanted):  # equal vectors make fewer centres than are wanted
                    free = own[~kept[own]]
                    chosen.append(int(free[(vectors[free] @ centres[cluster]).argmax()]))
                    kept[chosen[-1]] = True
    return chosen


class RareFirst(Embedded):
    """Rare kinds of records get their share before common ones."""

    name: ClassVar[str] = "rare_first"
    paper: ClassVar[str] = "Object-Focused Data Selection for Dense Prediction Tasks, 2024, arXiv 2412.10032"
    summary: ClassVar[str] = (
        "Tags from rare to frequent; of each the records nearest to its clusters' centres, unless enough of it is there already."
    )
    departs: ClassVar[str] = (
        "Units are tags of text records (clusters, questions' first words, answers' forms) instead of objects in pictures. A tag's records are "
        "clustered by the vectors of whole records, not of what bears the tag: for objects that is the paper's control. What the tags' quotas leave "
        "of the budget raises them."
    )

    scales: tuple[Annotated[int, Field(gt=0)], ...] = (32,)
    """Numbers of clusters that give a tag each."""
    least: Annotated[int, Field(gt=0)] = 2
    """Records that a tag must have."""

    def choose(self, pool: Pool) -> Choice:
        vectors = self.embed(pool)
        tagged = tags(pool, vectors, self.scales, self.least)
        holders: dict[str, list[int]] = {}
        for place in pool.order.tolist():
            for tag in sorted(tagged[place]):
                holders.setdefault(tag, []).append(place)
        rare_first = [np.array(holders[tag]) for tag in sorted(holders, key=lambda tag: (len(holders[tag]), tag))]
        chosen = quotas_filled(vectors, rare_first, self.about(pool), pool.seed)
        kept = set(chosen)
        rest = [place for place in ranked(pool, pool.uniform("rare first")).tolist() if place not in kept]
        return Choice(self.fill(pool, [*chosen, *rest]), {"tags": np.array([len(own) for own in tagged], dtype=np.float64)})
