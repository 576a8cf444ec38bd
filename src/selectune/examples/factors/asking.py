"""What a model is asked about records, and what its answer says.

Knows: how an instruction takes the place of a record's last question, how the final answer is found in a text, when two answers are the same and
which of many are alike, and a record with another answer or question. Does not know: who answers, or what is concluded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from selectune.data.records import Message, Record
from selectune.errors import UserError
from selectune.examples.factors.labels import answered as with_label

_WORD = re.compile(r"(?:(?<![\w)\]])-(?=\d))?\w+(?:(?<=\d)[./:](?=\d)\w+)*|[+/^<>=≤≥≠≈×÷]")
FORMAT = 'End with a new line that begins with "Answer: " and gives nothing but the answer.'


def questions_only(records: Sequence[Record], method: str) -> None:
    """Check that every record asks something.

    Raises:
        UserError: one is raw text.
    """
    for record in records:
        if not record.prompt:
            raise UserError(f"'{method}' asks the records' questions, and this one has none", file=record.source or None,
                            line=record.line or None, expected="records with a question and an answer")  # fmt: skip


def put(record: Record, text: str) -> tuple[Message, ...]:
    """Return a record's conversation up to its last question, with a text in the question's place."""
    return (*record.prompt[:-1], Message("user", text))


def question(record: Record) -> str:
    """Return what is asked, with the choices where the question itself does not name them."""
    if record.kind != "choice":
        return record.question
    return "\n".join([record.question, *(f"{chr(65 + n)}. {choice}" for n, choice in enumerate(record.choices))])


def solved(record: Record) -> str:
    """Return a question and its answer, as an example for others."""
    return f"Question: {question(record)}\nAnswer: {record.response}"


def final(text: str) -> str:
    """Return what stands behind the last ``Answer:``, or the whole text."""
    return re.split(r"(?i)\banswer\s*:", text)[-1].strip().strip("*").strip()


def choice_of(record: Record, text: str) -> int | None:
    """Return which of a record's choices a text names, by its words or its letter; None where it names none, or several."""
    said = _words(text)
    exact = [number for number, choice in enumerate(record.choices) if _words(choice) == said]
    letter = re.match(r"\(?([A-Za-z])(?:[).:]|$)", text.strip())
    if not exact and record.kind == "choice" and letter and ord(letter[1].upper()) - 65 < len(record.choices):
        exact = [ord(letter[1].upper()) - 65]
    within = exact or [number for number, choice in enumerate(record.choices) if _within(_words(choice), said)]
    return within[0] if len(within) == 1 else None


def same(record: Record, one: str, other: str) -> bool:
    """Whether two answers to a record's question say the same: the same choice, or the words of one are among the other's, in a row."""
    if record.choices:
        chosen = choice_of(record, one)
        return chosen is not None and chosen == choice_of(record, other)
    first, second = _words(one), _words(other)
    return _within(first, second) or _within(second, first)


def alike(record: Record, answers: Sequence[str]) -> list[list[int]]:
    """Return the numbers of a record's answers in groups in which each says the same as every other; what says nothing is in none.

    Two that say the same as a third need not agree ("lamp 7" and "lamp 9" with "lamp"): an answer joins the first group with all of which it does.
    """
    groups: list[list[int]] = []
    for number, text in enumerate(answers):
        if same(record, text, text):
            fitting = (group for group in groups if all(same(record, text, answers[other]) for other in group))
            group = next(fitting, None)
            if group is None:
                groups.append(group := [])
            group.append(number)
    return groups


def _words(text: str) -> str:
    """Return a text's words in lower case, numbers with their sign and decimals, and the signs between them; where it has none, its symbols."""
    text = re.sub(r"[$€£]", "", text.lower().replace("−", "-"))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<![\w.])\.(?=\d)", "0.", text)
    text = re.sub(r"(?<![\w.])(\d+\.\d*?)0+(?!\w|\.\d)", r"\1", text)
    return " ".join(_WORD.findall(text)) or "".join(text.split())


def _within(part: str, whole: str) -> bool:
    return bool(part) and f" {part} " in f" {whole} "


def answered(record: Record, text: str) -> Record | None:
    """Return a record with another answer; None where the text is none (empty, or not one of its choices)."""
    if record.choices:
        chosen = choice_of(record, text)
        return None if chosen is None else with_label(record, chosen)
    return replace(record, messages=(*record.prompt, Message("assistant", text))) if text.strip() else None
