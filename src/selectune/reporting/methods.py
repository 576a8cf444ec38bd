"""The catalogue for a person: tables in the terminal, and the pages of docs/methods.

Knows: what every method says of itself, and how its hyper-parameters are typed and documented. The pages are written from the classes
alone; nothing is added by hand but the words on axes and families below. Does not know: what any method does.
"""

from __future__ import annotations

import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from selectune import catalogue
from selectune.catalogue import KEYS, Method
from selectune.docstrings import of_attributes
from selectune.errors import UserError, nearest
from selectune.run import write_atomically

FAMILIES = {
    "parameters": "Ways to choose weights that belong to no other family.",
    "blocks": "Whole transformer blocks are chosen. What lies below the lowest one needs no backward pass, so the choice decides the cost.",
    "modules": "Kinds of modules are chosen in every block, such as attention or norms.",
    "heads-neurons-channels": "Attention heads, neurons of the MLP or channels are chosen: rows and columns that belong together.",
    "experts": "Experts of a mixture are chosen.",
    "elements": "Single entries, rows, columns or small squares of matrices are chosen, by a score.",
    "controls": "What every choice must beat: everything, chance, and simple rules. A method that is no better than these chose nothing.",
    "examples": "Ways to choose records that belong to no other family.",
    "quality": "Records are chosen one by one, by what each is worth: how hard it is for the base, how well it fits it, what was learnt from it.",
    "diversity": "Records are chosen for what they add to the others: groups, centres, volumes, coverage.",
    "target": "Records are chosen toward examples of what the specialist is for.",
    "adapters": "The chosen weights change in place, or something small is trained beside them.",
    "objectives": "What a token of a response costs.",
    "policies": "What happens between two steps: selections that are made again, weights that are frozen or averaged.",
    "merging": "What happens once training has ended: weights that return to the base.",
}
"""What the methods of a family have in common."""
RESULTS = "../../benchmarks/results"
"""From a page of docs/methods."""
WRITTEN = "<!-- Written by `make docs` from the classes of the catalogue. Do not edit. -->"
INDEX = """
A specialisation answers one question per axis, and a method is one answer. `selectune methods` lists them in the terminal,
`selectune methods show NAME` explains one.

## How the axes fit together

Selectune's first axis is selective fine-tuning: of the weights that are there, which may change? Two other traditions answer
the second question instead. Additive methods put new weights beside the old ones (adapters, prompts) and leave the old ones alone.
Reparametrised methods train few numbers that a larger change is computed from (LoRA: two thin matrices, and their product is the
change). Surveys file the three apart. Here they combine, since *which* and *in which form* are separate axes: LoRA beside eight
chosen blocks is an answer to both.

A way to choose weights is itself put together from five factors:

| factor | question | answers, from coarse to fine or from cheap to dear |
|---|---|---|
| granularity | What is chosen as one? | block, module, expert, head or channel, row or column, square, element |
| score | What makes a unit worth training? | a rule, chance, magnitude, activation, gradient, Fisher information, a trial training |
| allocation | How is the budget shared out? | the best anywhere, the same share of each layer, of each matrix, of each output |
| refresh | When is the choice made again? | never, once after a trial, every so many steps, at each step |
| form | How does what was chosen change? | in place, as a sparse difference, as a low-rank one |

Two methods that share four factors differ in the fifth, and a comparison of the two says something about that factor alone.

Whatever is compared, four things belong side by side: how many weights train, the peak memory, the time of a step, and the quality
reached. Every run of Selectune reports all four.
"""


@dataclass(frozen=True)
class Hyper:
    """A hyper-parameter as a person reads it."""

    name: str
    type: str
    default: str
    said: str


def show_methods(axis: str | None = None, console: Console | None = None) -> None:
    """Show a table of the methods of one axis, or of each.

    Raises:
        UserError: no such axis.
    """
    console = console or Console()
    if axis is not None and axis not in catalogue.AXES:
        raise UserError(f"unknown axis '{axis}'{nearest(axis, catalogue.AXES)}", expected=f"one of {', '.join(catalogue.AXES)}",
                        mend="name an axis, or `selectune methods show NAME` for one method")  # fmt: skip
    for each in [axis] if axis else catalogue.AXES:
        table = Table(title=f"[bold]{each}[/]: {question(each)} (recipe key `{KEYS[each]}`)", title_justify="left",
                      box=SIMPLE_HEAD, padding=(0, 2, 0, 0), title_style="")  # fmt: skip
        table.add_column("method", no_wrap=True, style="bold")
        table.add_column("summary", ratio=3)
        table.add_column("paper", ratio=2, style="dim")
        for name, method in catalogue.methods(each).items():
            table.add_row(escape(name), escape(method.summary), escape(paper_short(method)))
        console.print(table)
    console.print("selectune methods show NAME: paper, hyper-parameters, and the lines that use it", style="dim")


def show_method(name: str, console: Console | None = None) -> None:
    """Show everything that a method says of itself.

    Raises:
        UserError: no such method.
    """
    console = console or Console()
    every = {axis: catalogue.methods(axis) for axis in catalogue.AXES}
    found = [(axis, methods[name]) for axis, methods in every.items() if name in methods]
    if not found:
        known = [each for methods in every.values() for each in methods]
        raise UserError(f"unknown method '{name}'{nearest(name, known)}", mend="see `selectune methods` for all of them")
    for axis, method in found:
        console.print(f"[bold]{escape(name)}[/] ({axis}: {question(axis)})\n{escape(method.summary)}\n")
        for title, text in (("Paper", method.paper), ("Departs from it", method.departs)):
            if text:
                console.print(f"[bold]{title}[/]: {escape(text)}\n")
        rows = hypers(method)
        if rows:
            table = Table(title="Hyper-parameters", title_justify="left", box=SIMPLE_HEAD, padding=(0, 2, 0, 0))
            table.add_column("name", no_wrap=True)
            table.add_column("type")
            table.add_column("default", no_wrap=True)
            table.add_column("meaning", ratio=1)
            for row in rows:
                table.add_row(*(escape(text) for text in (row.name, row.type, row.default, row.said)))
            console.print(table)
        console.print("In a recipe:")
        console.print(Syntax(recipe_line(method), "yaml", background_color="default", word_wrap=True))
        console.print("From Python:")
        console.print(Syntax(python_line(method), "python", background_color="default", word_wrap=True))


def question(axis: str) -> str:
    """Return what an axis asks, in the words of its abstract class."""
    every = (each for method in catalogue.methods(axis).values() for each in method.__mro__)
    said = next(((each.__doc__ or "") for each in every if "axis" in each.__dict__ and issubclass(each, Method)), "")
    line = said.split("\n")[0].removeprefix("An answer to: ")
    asked = line[: line.find("?") + 1] or line
    return asked[:1].upper() + asked[1:]


def paper_short(method: type[Method]) -> str:
    """Return where and when a paper appeared, without its title: ``EMNLP Findings 2023, arXiv 2310.17041``.

    A title may have commas in it; the place is taken to begin at the last part that holds a year, with what follows.
    """
    parts = method.paper.split(", ")
    dated = [index for index, part in enumerate(parts) if any(word.isdigit() and len(word) == 4 for word in part.split())]
    return ", ".join(parts[dated[-1] :]) if dated else method.paper


def family(method: type[Method]) -> str:
    """Return the family of a method: its own word, or its axis."""
    return method.family or method.axis


def hypers(method: type[Method]) -> list[Hyper]:
    """Return a method's hyper-parameters in the order in which they are declared."""
    said = of_attributes(method)
    return [
        Hyper(name, _type_of(info), _default(info), " ".join(said.get(name, "").replace("``", "`").split()))
        for name, info in method.model_fields.items()
    ]


def defaults(method: type[Method]) -> dict[str, Any]:
    """Return a method as a recipe writes it, with every default; what has none is ``...``."""
    values: dict[str, Any] = {
        name: "..." if info.is_required() else info.get_default(call_default_factory=True)
        for name, info in method.model_fields.items()
    }
    made = method.model_construct(None, **values)
    return {"method": method.name, **made.model_dump(mode="json", warnings=False)}


def recipe_line(method: type[Method]) -> str:
    """Return the line of a recipe that uses a method, with its defaults written out."""
    values = defaults(method)
    said = (
        method.name if len(values) == 1 else yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=10**6).strip()
    )
    return f"{KEYS.get(method.axis, method.axis)}: {said}"


def python_line(method: type[Method]) -> str:
    """Return the call that uses a method, with its defaults written out."""
    values = defaults(method)
    said = _in_double_quotes(method.name if len(values) == 1 else values)
    return f'selectune.specialize("questions.jsonl", {KEYS.get(method.axis, method.axis)}={said})'


def _in_double_quotes(value: Any) -> str:
    """Return a Python literal whose strings stand in double quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_in_double_quotes(key)}: {_in_double_quotes(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_in_double_quotes, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def pages(evidence: Path | None = None) -> dict[str, str]:
    """Return the pages of the documentation by file name.

    Args:
        evidence: the folder of the experiments' pages, or one of their JSON files.
    """
    said = evidence_of(evidence)
    by_family: dict[str, list[type[Method]]] = {}
    for axis in catalogue.AXES:
        for method in catalogue.methods(axis).values():
            if method.__module__.startswith("selectune."):  # those of other packages have documentation of their own
                by_family.setdefault(family(method), []).append(method)
    made = {f"{name}.md": _page(name, methods, said) for name, methods in by_family.items()}
    return {"index.md": _index(by_family), **made}


def write_pages(folder: Path, evidence: Path | None = None) -> list[Path]:
    """Write the pages; those written earlier and no longer needed are removed."""
    made = pages(evidence)
    for name, text in made.items():
        write_atomically(folder / name, text)
    for file in folder.glob("*.md"):
        if file.name not in made and file.read_text(encoding="utf-8").startswith(WRITTEN):
            file.unlink()
    return [folder / name for name in made]


Evidence = dict[tuple[bool, str], list[tuple[str, str]]]
"""Whether examples are chosen, and the name of a method -> the name of an experiment's page, and a sentence."""


def evidence_of(place: Path | None) -> Evidence:
    """Return what experiments found: those of a folder, or one.

    Read tolerantly, since the files are another stage's: the outcome of each claim, and for what was measured without one, on which
    tasks. A line of an experiment that is no method's name counts for the method that chose its weights or records.
    """
    files = [] if place is None else sorted(place.glob("*.json")) if place.is_dir() else [place] if place.is_file() else []
    found: Evidence = {}
    silent: Evidence = {}
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(result, dict) and isinstance(result.get("cells"), list):
            _read_experiment(file.stem, result, found, silent)
    return found | {method: said for method, said in silent.items() if method not in found}


def _read_experiment(page: str, result: dict[str, Any], found: Evidence, silent: Evidence) -> None:
    """Add what one experiment found: to the one what was decided, to the other what was measured without a claim."""
    of_examples = result.get("protocol", {}).get("axis") == "examples"
    axis = "examples" if of_examples else "parameters"
    known = {name for each in ([axis] if of_examples else catalogue.AXES) for name in catalogue.methods(each)}
    cells = [cell for cell in result["cells"] if not cell.get("failed")]
    chosen_by = {cell.get("method"): _named(cell.get("recipe", {}).get(axis)) for cell in cells}
    decided = set()
    for claim in result.get("claims", []):
        line = claim.get("method", "")
        intervals = (
            f"{on} {mean:+.3f} [{low:+.3f}, {high:+.3f}]" for on, (low, mean, high) in claim.get("intervals", {}).items()
        )
        shown = f" ({'; '.join(intervals)})" if claim.get("intervals") else ""
        sentence = f"{str(claim.get('claim', '')).rstrip('.')}: {claim.get('verdict', 'not decided')}{shown}."
        name = line if line in known else chosen_by.get(line) or line
        decided.add(name)
        found.setdefault((of_examples, name), []).append((page, sentence))
    for line, by in chosen_by.items():
        name = line if line in known else by
        if name in known and name not in decided:
            tasks = sorted({cell.get("task", "?") for cell in cells if cell.get("method") == line})
            silent.setdefault((of_examples, name), []).append((page, f"measured on {', '.join(tasks)}; no claim is decided."))


def _named(choice: Any) -> str | None:
    """Return the method's name in what a recipe says of it."""
    return choice.get("method") if isinstance(choice, dict) else choice.partition(":")[0] if isinstance(choice, str) else None


def _index(by_family: dict[str, list[type[Method]]]) -> str:
    lines = [WRITTEN, "# Methods", INDEX.rstrip()]
    for axis in catalogue.AXES:
        lines += [
            "",
            f"## {axis}",
            f"{question(axis)} Recipe key `{KEYS[axis]}`.",
            "",
            "| family | methods |",
            "|---|---|",
        ]
        for name, methods in sorted(by_family.items()):
            mine = [f"[`{method.name}`]({name}.md#{method.name})" for method in methods if method.axis == axis]
            if mine:
                lines.append(f"| [{name}]({name}.md) | {', '.join(mine)} |")
    return "\n".join(lines) + "\n"


def _page(name: str, methods: list[type[Method]], evidence: Evidence) -> str:
    lines = [WRITTEN, f"# {name.replace('-', ', ').capitalize()}", "", FAMILIES.get(name, ""), "", "[All methods](index.md)"]
    for method in sorted(methods, key=lambda each: (each.axis, each.name)):
        lines += ["", f"## {method.name}", "", " ".join(method.summary.split())]
        if method.paper:
            lines += ["", f"**Paper.** {' '.join(method.paper.split())}"]
        if method.departs:
            lines += ["", f"**Departs.** {' '.join(method.departs.split())}"]
        for page, sentence in evidence.get((method.axis == "examples", method.name), []):
            lines += ["", f"**[Measured here]({RESULTS}/{page}.md).** {sentence}"]
        rows = hypers(method)
        if rows:
            lines += ["", "| hyper-parameter | type | default | meaning |", "|---|---|---|---|"]
            lines += [f"| `{row.name}` | {_cell(row.type)} | `{row.default}` | {_cell(row.said)} |" for row in rows]
        lines += ["", "```yaml", recipe_line(method), "```"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "none: must be given"
    value = info.get_default(call_default_factory=True)
    return json.dumps(value) if isinstance(value, str | int | float | bool | list | dict | None) else str(value)


def _type_of(info: FieldInfo) -> str:
    return _type(info.annotation) + _bounds(info.metadata)


def _type(annotation: Any) -> str:
    """Write a type in words: ``int > 0 or none``, ``"true" or "sampled"``."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(inside[0]) + "".join(
            _bounds(each.metadata if isinstance(each, FieldInfo) else [each]) for each in inside[1:]
        )
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type, inside))
    if origin is typing.Literal:
        return " or ".join(json.dumps(value) for value in inside)
    if origin is not None:
        return f"{origin.__name__} of {', '.join('any number' if each is Ellipsis else _type(each) for each in inside)}"
    return "none" if annotation in (type(None), PydanticUndefined) else getattr(annotation, "__name__", str(annotation))


def _bounds(metadata: list[Any]) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    said = [
        f"{sign} {getattr(each, key):g}"
        for each in metadata
        for key, sign in signs.items()
        if getattr(each, key, None) is not None
    ]
    return f" {', '.join(said)}" if said else ""
