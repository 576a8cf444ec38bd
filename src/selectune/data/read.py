"""Files into rows.

Knows: jsonl, json, csv, tsv, parquet, CoNLL tags, plain text and markdown, each also gzipped; files, folders, globs and hub
ids; what can be wrong with a file and where. Does not know: what the columns mean.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectune.errors import UserError
from selectune.hub import hub_is_there

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md", ".markdown", ".log", ".text")
_TEXT = (".txt", ".md", ".markdown", ".log", ".text")
csv.field_size_limit(1 << 30)


@dataclass(frozen=True)
class Row:
    """One row of a file: its columns, and where it stands."""

    values: dict[str, Any]
    file: str
    line: int


def find_files(sources: str | list[str], field: str) -> list[Path]:
    """Return the readable files behind names, folders and globs, sorted.

    Raises:
        UserError: nothing is there, or nothing in it can be read.
    """
    found: list[Path] = []
    for source in [sources] if isinstance(sources, str) else sources:
        path = Path(source).expanduser()
        if any(mark in source for mark in "*?["):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
            if not matches:
                raise UserError("no file matches this pattern", file=source, field=field)
            found += matches
        elif path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and _suffix(p) in SUFFIXES and not _is_notes(p)]
            if not inside:
                raise UserError("the folder holds no file that can be read", file=source, field=field,
                                expected=f"files that end in {', '.join(SUFFIXES)}, also with .gz")  # fmt: skip
            found += inside
        elif path.is_file():
            if _suffix(path) not in SUFFIXES:
                recipe = _suffix(path) in (".yaml", ".yml")
                raise UserError(f"files that end in '{path.suffix}' are not read", file=source, field=field,
                                expected=f"one of {', '.join(SUFFIXES)}, also with .gz",
                                mend="give a recipe with --recipe" if recipe else "convert it to jsonl")  # fmt: skip
            found.append(path)
        else:
            raise UserError("no such file or folder", file=source, field=field, mend="check the path")
    return list(dict.fromkeys(found))


def is_hub_id(source: str) -> bool:
    """Whether a name looks like ``owner/name`` of a hub and nothing of that name is here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source)) and not Path(source).exists() and _suffix(Path(source)) == ""


def read_rows(sources: str | list[str], field: str = "data.train") -> list[Row]:
    """Read every row of some sources.

    Raises:
        UserError: a file is missing, empty, damaged, in another encoding, or broken at some line.
    """
    listed = [sources] if isinstance(sources, str) else sources
    rows: list[Row] = []
    for source in listed:
        if is_hub_id(source):
            rows += _read_hub(source, field)
        else:
            for path in find_files(source, field):
                rows += read_file(path)
    if not rows:
        raise UserError("holds no records", file=listed[0], field=field)
    return rows


def read_file(path: Path) -> list[Row]:
    """Read the rows of one file."""
    suffix = _suffix(path)
    if suffix == ".parquet":
        rows = list(_parquet(path))
    else:
        text = _decode(path, _bytes(path))
        readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv}
        rows = list(readers.get(suffix, _text)(path, text))
    if not rows:
        raise UserError("the file is empty", file=path, expected="at least one record")
    return rows


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _is_notes(path: Path) -> bool:
    """Whether a file in a folder describes the data instead of being data."""
    return path.name.split(".")[0].lower() in ("readme", "license", "licence", "notice", "changelog") or path.name[0] == "."


def _bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            return gzip.decompress(content)
    except PermissionError:
        raise UserError("may not be read", file=path, mend="change its permissions") from None
    except gzip.BadGzipFile:
        raise UserError("ends in .gz but is not gzipped", file=path, mend="rename it, or gzip it") from None
    except (EOFError, zlib.error):
        raise UserError("the gzip file is truncated or damaged", file=path, mend="copy or download it again") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", file=path) from None
    return content


def _decode(path: Path, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"byte {content[error.start]:#04x} is not UTF-8", file=path, line=line, expected="text in UTF-8",
            mend=f"convert it: iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}",
        ) from None  # fmt: skip
    if "\x00" in text[:4096]:
        raise UserError("is a binary file", file=path, line=1, expected="text in UTF-8")
    if not text.strip():
        raise UserError("the file is empty", file=path, expected="at least one record")
    return text


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"broken JSON ({error.msg} at column {error.colno})", file=path, line=number,
                            expected="one JSON object per line", mend="repair or delete the line") from None  # fmt: skip
        if not isinstance(value, dict):
            raise UserError(f"the line holds {_kind(value)}", file=path, line=number, expected="a JSON object")
        yield Row(value, str(path), number)


def _json(path: Path, text: str) -> Iterator[Row]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under another name
            yield from _jsonl(path, text)
            return
        raise UserError(f"broken JSON ({error.msg})", file=path, line=error.lineno, mend="repair the line") from None
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
        if len(value) == len(lists) == 1 or (lists and "data" in lists):
            value = value["data" if "data" in lists else lists[0]]
        elif value and all(isinstance(item, dict) for item in value.values()):  # id -> record
            value = [{"id": key, **item} if "id" not in item else item for key, item in value.items()]
        elif value and all(isinstance(item, str) for item in value.values()):  # id -> label
            value = [{"id": key, "value": item} for key, item in value.items()]
        else:
            value = [value]
    if not isinstance(value, list):
        raise UserError(f"the file holds {_kind(value)}", file=path, expected="a list of records")
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            raise UserError(f"record {number} is {_kind(item)}", file=path, line=number, expected="an object with fields")
        yield Row(item, str(path), number)


def _csv(path: Path, text: str, delimiter: str = ",") -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    last = 0
    try:
        for cells in reader:
            start, last = last + 1, reader.line_num
            if not cells:
                continue
            if header is None:
                if _is_header(cells):
                    header = [cell.strip() for cell in cells]
                    continue
                header = [f"column {index + 1}" for index in range(len(cells))]
            if len(cells) != len(header):
                raise UserError(
                    f"the row has {len(cells)} columns", file=path, line=start, expected=f"{len(header)} columns",
                    mend="quote cells that contain the separator",
                )  # fmt: skip
            yield Row(dict(zip(header, cells)), str(path), start)
    except csv.Error as error:
        raise UserError(f"broken row ({error})", file=path, line=reader.line_num, mend="repair its quotes") from None


def _tsv(path: Path, text: str) -> Iterator[Row]:
    lines = text.split("\n")
    filled = [line for line in lines[:200] if line.strip()]
    if len(filled) < len(lines[:200]) and filled and all(re.fullmatch(r"\S+\t[OBIES](-\S+)?", line) for line in filled):
        yield from _conll(path, lines)
    else:
        yield from _csv(path, text, "\t")


def _conll(path: Path, lines: list[str]) -> Iterator[Row]:
    """Sentences of ``token<TAB>tag`` lines, as instructions to list the entities."""
    tokens: list[str] = []
    entities: list[str] = []
    start = 1
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            token, _, tag = line.partition("\t")
            if not tokens:
                start = number
            if tag.startswith(("B", "S")) or (tag.startswith(("I", "E")) and not entities):
                entities.append(token)
            elif tag.startswith(("I", "E")):
                entities[-1] += f" {token}"
            tokens.append(token)
        elif tokens:
            found = "; ".join(dict.fromkeys(entities)) or "none"
            instruction = "List the named entities, or say none."
            values = {"instruction": instruction, "input": " ".join(tokens), "output": found}
            yield Row(values, str(path), start)
            tokens, entities = [], []


def _text(path: Path, text: str) -> Iterator[Row]:
    """Markdown by its headings, text by its empty lines; a file of single lines, line by line."""
    if _suffix(path) in (".md", ".markdown"):
        border = r"(?m)^(?=#{1,6} )"
    elif "\n\n" not in text and text.count("\n") > 20:
        border = r"\n"
    else:
        border = r"\n[ \t]*\n"
    starts = [0, *(match.end() for match in re.finditer(border, text))]
    for start, end in zip(starts, [*starts[1:], len(text)]):
        part = text[start:end].strip()
        if part:
            yield Row({"text": part}, str(path), text.count("\n", 0, start) + 1)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(_bytes(path)))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"the parquet file is truncated or damaged ({reason})", file=path,
                        mend="copy or write it again") from None  # fmt: skip
    for number, values in enumerate(table.to_pylist(), 1):
        yield Row(values, str(path), number)


def _read_hub(source: str, field: str) -> list[Row]:
    import datasets

    try:
        hub_is_there()  # else only what was loaded before
        loaded = datasets.load_dataset(source)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"not here, and not reachable on a hub ({reason})", file=source, field=field,
                        mend="check the path or the connection") from None  # fmt: skip
    split = "train" if "train" in loaded else next(iter(loaded))
    return [Row(dict(values), source, number) for number, values in enumerate(loaded[split], 1)]


def _is_header(cells: list[str]) -> bool:
    """Whether a first row names columns: short, distinct, filled cells without sentences or numbers."""
    names = [cell.strip() for cell in cells]
    if len(names) < 2 and names[0].lower() not in ("text", "content"):
        return False
    plain = all(re.fullmatch(r"[A-Za-z_][\w .:/()-]{0,60}", name) and not name.endswith(".") for name in names)
    short = all(len(name.split()) <= 5 for name in names)
    return plain and short and len(set(names)) == len(names) and not _labelled(names)


def _labelled(names: list[str]) -> bool:
    """Whether a two-cell row is a label and a text rather than two names."""
    return len(names) == 2 and any(len(name) > 40 for name in names)


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}
    return kinds.get(type(value), "nothing")
