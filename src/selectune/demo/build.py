"""Writes the built-in domain's three files: `python -m selectune.demo.build`; `--check` exits 1 if they differ.

Knows: how facts and wordings become training records and test questions, always the same ones.
Does not know: the facts (`facts.py`), the wordings (`phrasings.py`), the manual's prose (`manual.py`).

A training answer is short, exactly as a test choice writes it.
The wrong choices of a test question are right answers to other questions of the same kind.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from selectune.demo import facts, files
from selectune.demo.manual import manual
from selectune.demo.phrasings import WORDINGS

SEED = 7
TESTED = 0.85  # of each kind that can be tested


@dataclass(frozen=True)
class Fact:
    """One thing to know: of `kind`, about `subject`, namely `value`."""

    kind: str
    subject: str
    value: str


def all_facts() -> list[Fact]:
    """Return every fact, in the order of the tables."""
    parts = {name: (number, work, *facts.STATIONS[station]) for name, (station, number, work) in facts.PARTS.items()}
    faults = {code: (meaning, *facts.FAULT_LETTERS[code[0]]) for code, meaning in facts.FAULTS.items()}
    columns: dict[tuple[str, ...], Mapping[str, tuple]] = {
        (
            "part number",
            "work of a part",
            "location",
            "material",
            "service interval",
            "supplier",
            "torque",
            "safe distance",
        ): parts,
        ("fault meaning", "fault cause", "fault remedy", "alarm grade"): faults,
        ("crate", "keeping time", "store"): facts.SUPPLIES,
        ("factory value", "control"): facts.SETTINGS,
        ("lamp meaning", "lamp action"): facts.LAMPS,
        ("first step", "", "last step", "tool", "time allowed"): facts.JOBS,
        ("first serial", "mount"): facts.ATTACHMENTS,
    }
    found = [
        Fact(kind, subject, value)
        for kinds, table in columns.items()
        for subject, row in table.items()
        for kind, value in zip(kinds, row, strict=True)
        if kind
    ]
    return found + [Fact("general", subject, value) for subject, value in facts.GENERAL.items()]


def training_records(fact: Fact) -> list[dict[str, str]]:
    """Return the records that teach one fact, one for each wording."""
    return [{"question": _fill(template, fact), "answer": f"{_short(fact)}."} for template in WORDINGS[fact.kind].train]


def test_records(everything: list[Fact]) -> list[tuple[Fact, dict[str, object]]]:
    """Return the test questions, each with the fact it asks."""
    draw = random.Random(SEED)
    asked: list[tuple[Fact, str, str, list[str]]] = []
    for kind, wording in WORDINGS.items():
        if not wording.test:
            continue
        same = [fact for fact in everything if fact.kind == kind]
        for number, fact in enumerate(draw.sample(same, round(TESTED * len(same)))):
            answer = _short(fact)
            others = sorted({_short(other) for other in same} - {answer})
            asked.append((fact, _fill(wording.test[number % len(wording.test)], fact), answer, draw.sample(others, 3)))
    positions = [number % 4 for number in range(len(asked))]
    draw.shuffle(positions)
    draw.shuffle(asked)
    return [
        (fact, {"question": question, "choices": [*wrong[:at], answer, *wrong[at:]], "answer": answer})
        for at, (fact, question, answer, wrong) in zip(positions, asked, strict=True)
    ]


def build() -> dict[str, str]:
    """Return the name and text of every file."""
    everything = all_facts()
    train = [record for fact in everything for record in training_records(fact)]
    random.Random(SEED).shuffle(train)
    return {
        "train.jsonl": _lines(train),
        "test.jsonl": _lines([record for _, record in test_records(everything)]),
        "manual.md": manual(),
    }


def main(arguments: list[str]) -> int:
    """Write the files, or, with `--check`, say which ones are not as they would be written."""
    built, paths = build(), files()
    if "--check" not in arguments:
        for name, text in built.items():
            paths[name].write_text(text, encoding="utf-8", newline="\n")
        return 0
    differ = [
        name for name, text in built.items() if not paths[name].is_file() or paths[name].read_text(encoding="utf-8") != text
    ]
    for name in differ:
        print(f"{name} differs: run python -m selectune.demo.build")
    return 1 if differ else 0


def _short(fact: Fact) -> str:
    return fact.value[0].upper() + fact.value[1:]


def _fill(template: str, fact: Fact) -> str:
    text = template.format(s=fact.subject)
    for vowel in "aeiou":  # "a ember plate" is "an ember plate"
        text = text.replace(f" a {vowel}", f" an {vowel}")
        text = f"An {text[2:]}" if text.startswith(f"A {vowel}") else text
    return text[0].upper() + text[1:]


def _lines(records: list[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
