"""Rows into records: which shape is this, and what does each column mean?

Knows: the shapes (chat, ShareGPT, prompt and completion, instruction, question and answer, question with choices, text with
a label, raw text), the names that their columns go by, and the wording of the prompts that are made from them.
Does not know: files, splits or tokens. An explicit column mapping always wins over what is found.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from selectune.data.read import Row
from selectune.data.records import Message, Record
from selectune.errors import UserError, nearest

# role -> the column names that are taken for it, best first; compared in lower case with spaces as underscores
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "chat": {"messages": ("messages", "chat", "dialog", "dialogue")},
    "sharegpt": {"conversations": ("conversations", "conversation")},
    "choice": {
        "question": ("question", "query", "ctx", "input_final_prompts", "prompt", "stem"),
        "choices": ("choices", "options", "endings", "answers", "candidates"),
        "answer": ("answer", "gold", "label", "answer_idx", "answer_index", "answerkey", "correct", "target"),
    },
    "instruction": {
        "instruction": ("instruction",),
        "input": ("input", "context"),
        "output": ("output", "response", "answer", "completion"),
    },
    "prompt_completion": {"prompt": ("prompt", "source"), "completion": ("completion", "response", "chosen", "target")},
    "classification": {
        "text": ("text", "sentence", "content", "question", "document", "message", "review", "title"),
        "label": ("label", "sentiment", "class", "category", "intent", "final_decision", "answer", "target", "eventid"),
        "context": ("contexts", "context", "passage"),
    },
    "question_answer": {
        "question": ("question", "query", "problem", "input", "context", "text"),
        "answer": ("answer", "response", "solution", "long_answer", "output", "continuation"),
    },
    "text": {"text": ("text", "content", "body", "document", "paragraph", "eventtemplate")},
}
OPTIONAL = {"input", "context"}
LETTERS = "ABCDEFGHIJKLMNOP"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
         "bot": "assistant", "chatgpt": "assistant", "system": "system"}  # fmt: skip


@dataclass
class Shape:
    """A shape and where its parts are."""

    name: str
    columns: dict[str, str]
    labels: tuple[str, ...] = ()
    options: tuple[str, ...] = field(default=())
    """Columns that each hold one choice."""


def find_shape(rows: list[Row], wanted: str = "auto", mapping: dict[str, str] | None = None) -> Shape:
    """Find the shape of some rows.

    Args:
        rows: all rows. wanted: a shape's name, or ``"auto"``. mapping: role -> column; always wins.

    Raises:
        UserError: no shape fits, a mapped column is missing, or the rows are of several shapes.
    """
    mapping = mapping or {}
    columns = list(rows[0].values)
    for role, column in mapping.items():
        if not any(column in row.values for row in rows):
            raise UserError(f"there is no column '{column}'{nearest(column, columns)}", file=rows[0].file,
                            field=f"data.columns.{role}", expected=f"one of {', '.join(map(str, columns))}")  # fmt: skip
    twice = [column for column in mapping.values() if list(mapping.values()).count(column) > 1]
    if twice:
        raise UserError(f"column '{twice[0]}' is given two roles", field="data.columns", expected="a column for each role")
    first = _shape_of(rows[0], wanted, mapping)
    if first is not None and first.options:
        first.options = tuple(dict.fromkeys(column for row in rows for column in _option_columns(row))) or first.options
    if first is None:
        raise UserError(
            f"the columns {', '.join(map(repr, columns))} fit no shape" + (f" '{wanted}'" if wanted != "auto" else ""),
            file=rows[0].file, line=rows[0].line,
            expected="for instance 'messages', or 'question' and 'answer', or 'text'",
            mend="say which column is which, with data.columns or --column question=COLUMN",
        )  # fmt: skip
    wanted_columns = [column for role, column in first.columns.items() if role not in OPTIONAL]
    for row in rows:
        missing = [column for column in wanted_columns if column not in row.values]
        if missing:
            other = _shape_of(row, wanted, mapping)
            raise UserError(
                f"the record has no '{missing[0]}'" + (f"; it looks like '{other.name}'" if other else ""),
                file=row.file, line=row.line, field=missing[0],
                expected=f"'{first.name}' records as at {rows[0].file}:{rows[0].line}",
                mend="keep one shape in a run, or name the files apart",
            )  # fmt: skip
    if first.name == "classification":
        seen = sorted({_plain(row.values[first.columns["label"]]) for row in rows})
        if wanted == "auto" and not mapping and (len(seen) > max(20, 0) or len(seen) * 5 > len(rows) or not all(seen)):
            again = _shape_of(rows[0], "question_answer", {}) or _shape_of(rows[0], "text", {})
            if again is not None:
                return again
        first.labels = tuple(label for label in seen if label)
    return first


def _shape_of(row: Row, wanted: str, mapping: dict[str, str]) -> Shape | None:
    lower = {re.sub(r"\s+", "_", str(column).strip().lower()): column for column in row.values}
    options = _option_columns(row)
    for shape in [wanted] if wanted != "auto" else list(NAMES):
        if any(role not in NAMES[shape] for role in mapping):
            continue
        columns: dict[str, str] = {}
        for role, names in NAMES[shape].items():
            found = mapping.get(role) or next((lower[name] for name in names if name in lower), None)
            if found is not None and found not in columns.values():
                columns[role] = found
        if shape == "choice" and options and "question" in columns and "choices" not in columns:
            columns["choices"] = options[0]
        if shape == "choice" and not mapping and _headerless_choice(row):
            keys = list(row.values)
            return Shape("choice", {"question": keys[0], "answer": keys[-1], "choices": keys[1]}, options=tuple(keys[1:-1]))
        if shape == "classification" and not mapping and _headerless_label(row):
            keys = sorted(row.values, key=lambda key: len(str(row.values[key])))
            return Shape("classification", {"text": keys[1], "label": keys[0]})
        needed = set(NAMES[shape]) - OPTIONAL
        if needed <= set(columns) and _fits(shape, row, columns, wanted != "auto" or bool(mapping)):
            many = options if shape == "choice" and columns["choices"] in options else ()
            return Shape(shape, columns, options=tuple(many))
    return None


def _option_columns(row: Row) -> list[str]:
    for pattern in (r"option[ _]?\d+", r"choice[ _]?\d+", r"[a-p]"):
        found = [column for column in row.values if re.fullmatch(pattern, str(column).strip().lower())]
        if len(found) >= 2:
            return found
    return []


def _headerless_choice(row: Row) -> bool:
    keys = list(row.values)
    last = str(row.values[keys[-1]]).strip()
    return keys[0] == "column 1" and len(keys) >= 4 and len(last) == 1 and last in LETTERS[: len(keys) - 2]


def _headerless_label(row: Row) -> bool:
    if list(row.values) != ["column 1", "column 2"]:
        return False
    short, long = sorted(map(str, row.values.values()), key=len)
    return len(short.split()) <= 2 and len(long) > 2 * len(short)


def _fits(shape: str, row: Row, columns: dict[str, str], told: bool) -> bool:
    """Whether the values are of the kind that the shape needs; a shape that the user named is not doubted."""
    value = {role: row.values.get(column) for role, column in columns.items()}
    if shape == "chat":
        return isinstance(value["messages"], list)
    if shape == "sharegpt":
        return isinstance(value["conversations"], list)
    if shape == "choice":
        return isinstance(value["choices"], list | dict) or bool(_option_columns(row)) or told
    if shape == "classification" and not told:
        label = _plain(value["label"])
        named = columns["label"].lower() != "answer" or columns["text"].lower() in ("text", "sentence")
        return 0 < len(label.split()) <= 3 and len(label) <= 32 and not re.search(r"\d", label) and named
    return True


def to_records(rows: list[Row], shape: Shape, system: str | None = None, labels: list[str] | None = None) -> list[Record]:
    """Turn rows into records; records whose response is empty come back with an empty response.

    Raises:
        UserError: a field has the wrong type, an answer is not among the choices, a label is not allowed, a role is unknown.
    """
    allowed = tuple(labels) if labels else shape.labels
    makers: dict[str, Callable[[Row], dict[str, Any]]] = {
        "chat": lambda row: _chat(row, shape.columns["messages"], "role", "content"),
        "sharegpt": lambda row: _chat(row, shape.columns["conversations"], "from", "value"),
        "choice": lambda row: _choice(row, shape),
        "classification": lambda row: _classification(row, shape, allowed),
        "text": lambda row: {"kind": "text", "text": _string(row, shape.columns["text"])},
    }
    make = makers.get(shape.name) or (lambda row: _pair(row, shape))
    records = []
    for row in rows:
        values = make(row)
        messages = values.get("messages", ())
        if system and messages and messages[0].role != "system":
            values["messages"] = (Message("system", system), *messages)
        records.append(Record(source=row.file, line=row.line, **values))
    return records


def _pair(row: Row, shape: Shape) -> dict[str, Any]:
    columns = shape.columns
    if shape.name == "instruction":
        prompt, answer = _string(row, columns["instruction"]), _string(row, columns["output"])
        extra = _string(row, columns["input"]) if "input" in columns and row.values.get(columns["input"]) else ""
        prompt = f"{prompt}\n\n{extra}" if extra.strip() else prompt
    elif shape.name == "prompt_completion":
        prompt, answer = _string(row, columns["prompt"]), _string(row, columns["completion"])
    else:
        prompt, answer = _string(row, columns["question"]), _string(row, columns["answer"])
    return {"kind": "chat", "messages": (Message("user", prompt.strip()), Message("assistant", answer.strip()))}


def _chat(row: Row, column: str, role_key: str, content_key: str) -> dict[str, Any]:
    turns = row.values[column]
    if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):  # turn about, the user first
        turns = [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError("is not a list of turns", file=row.file, line=row.line, field=column, expected="a list of objects")
    messages = []
    for index, turn in enumerate(turns):
        where = f"{column}[{index}]"
        role = turn.get(role_key, turn.get("role", turn.get("from")))
        content = turn.get(content_key, turn.get("content", turn.get("value")))
        if role not in ROLES:
            raise UserError(f"unknown role {role!r}{nearest(str(role), ROLES)}", file=row.file, line=row.line, field=where,
                            expected="system, user or assistant")  # fmt: skip
        if not isinstance(content, str):
            raise UserError("the content is not text", file=row.file, line=row.line, field=where, expected="a string")
        messages.append(Message(ROLES[role], content))
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if not messages:
        raise UserError("no assistant message to learn from", file=row.file, line=row.line, field=column,
                        expected="at least one message of role assistant")  # fmt: skip
    return {"kind": "chat", "messages": tuple(messages)}


def _choice(row: Row, shape: Shape) -> dict[str, Any]:
    columns = shape.columns
    given = [row.values.get(name) for name in shape.options] if shape.options else row.values[columns["choices"]]
    if isinstance(given, dict):  # {"text": [...], "label": [...]} or {"A": ..., "B": ...}
        given = given["text"] if "text" in given else list(given.values())
    choices = tuple(str(choice).strip() for choice in given if choice is not None and str(choice).strip())
    answer = row.values[columns["answer"]]
    index = _answer_index(answer, choices)
    if index is None:
        raise UserError(f"the answer {str(answer)[:60]!r} is not among the {len(choices)} choices", file=row.file,
                        line=row.line, field=columns["answer"], expected="a choice's text, letter or index from 0")  # fmt: skip
    question = _string(row, columns["question"]).strip()
    messages = (Message("user", question), Message("assistant", choices[index]))
    return {"kind": "choice", "messages": messages, "choices": choices, "answer": index}


def _answer_index(answer: Any, choices: tuple[str, ...]) -> int | None:
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    text = str(answer).strip()
    if not isinstance(answer, bool) and re.fullmatch(r"\d+", text) and text not in choices:
        return int(text) if int(text) < len(choices) else None
    if text in choices:
        return choices.index(text)
    if len(text) == 1 and text.upper() in LETTERS[: len(choices)]:
        return LETTERS.index(text.upper())
    numbered = re.match(r"option (\d+)\s*:", text)
    if numbered and 1 <= int(numbered[1]) <= len(choices):
        return int(numbered[1]) - 1
    lowered = [choice.lower().rstrip(".") for choice in choices]
    return lowered.index(text.lower().rstrip(".")) if text.lower().rstrip(".") in lowered else None


def _classification(row: Row, shape: Shape, labels: tuple[str, ...]) -> dict[str, Any]:
    label = _plain(row.values[shape.columns["label"]])
    if label and label not in labels:
        raise UserError(f"the label {label!r} is not allowed{nearest(label, labels)}", file=row.file, line=row.line,
                        field=shape.columns["label"], expected=f"one of {', '.join(labels)}")  # fmt: skip
    parts = []
    if "context" in shape.columns and row.values.get(shape.columns["context"]):
        context = row.values[shape.columns["context"]]
        parts.append(" ".join(map(str, context)) if isinstance(context, list) else str(context))
    parts.append(_string(row, shape.columns["text"]).strip())
    parts.append(f"Answer with one of: {', '.join(labels)}.")
    messages = (Message("user", "\n\n".join(parts)), Message("assistant", label))
    return {"kind": "classification", "messages": messages, "choices": labels,
            "answer": labels.index(label) if label else -1}  # fmt: skip


def _string(row: Row, column: str) -> str:
    value = row.values.get(column)
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"is not text but {type(value).__name__}", file=row.file, line=row.line, field=column,
                        expected="a string")  # fmt: skip
    return value


def _plain(value: Any) -> str:
    return "" if value is None else str(value).strip()
