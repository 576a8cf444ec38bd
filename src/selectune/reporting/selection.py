"""What trains, as a picture and as a table: the share of every matrix of every block, with exact counts.

Knows: how parameters' names are laid out in blocks. Does not know: the model; a selection and the names in it are enough.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selectune.parameters.overlap import Overlap, total
from selectune.parameters.selection import Selection
from selectune.reporting import charts
from selectune.reporting.report import environment
from selectune.run import Run, Scores, write_atomically

Place = tuple[int | None, str]
"""A block (None outside of the blocks) and a matrix in it."""


def place_of(name: str) -> Place:
    """Take a parameter's name apart; single experts count as one matrix.

    >>> place_of("model.layers.3.mlp.down_proj.weight")
    (3, 'mlp.down_proj')
    """
    found = re.match(r"(?:.*?\.)?(\d+)\.(.+)$", name)
    block, rest = (int(found[1]), found[2]) if found else (None, name)
    return block, re.sub(r"\.\d+\.", ".*.", rest).removesuffix(".weight")


@dataclass
class Cell:
    """A matrix of a block."""

    chosen: int = 0
    size: int = 0
    forms: set[str] = field(default_factory=set)

    @property
    def share(self) -> float:
        return self.chosen / self.size if self.size else 0.0

    def add(self, chosen: int, size: int, forms: Iterable[str]) -> None:
        self.chosen, self.size = self.chosen + chosen, self.size + size
        self.forms |= set(forms)


@dataclass
class Layout:
    """A selection by block and matrix."""

    cells: dict[Place, Cell]
    blocks: int
    """Blocks of the model, as far as it is known."""

    @classmethod
    def of(cls, selection: Selection, blocks: int | None = None) -> Layout:
        """Lay a selection out; without the number of blocks, up to the last one touched."""
        cells: dict[Place, Cell] = {}
        for name, part in selection.parts.items():
            cells.setdefault(place_of(name), Cell()).add(part.count(), math.prod(part.shape), [part.form])
        last = max((block for block, _ in cells if block is not None), default=-1)
        return cls(cells, max(blocks or 0, last + 1))

    def matrices(self) -> list[str]:
        """Return the matrices that are touched in some block, by name."""
        return sorted({matrix for block, matrix in self.cells if block is not None})

    def shares(self) -> list[list[float]]:
        """Return the share of each matrix (column) of each block (row)."""
        empty = Cell()
        return [[self.cells.get((block, matrix), empty).share for matrix in self.matrices()] for block in range(self.blocks)]

    def rows(self) -> list[tuple[str, Cell]]:
        """Return each matrix over all blocks that it is touched in, then the parameters outside of the blocks."""
        together: dict[str, Cell] = {}
        for (_, matrix), cell in sorted(self.cells.items(), key=lambda item: (item[0][0] is None, item[0][1])):
            together.setdefault(matrix, Cell()).add(cell.chosen, cell.size, cell.forms)
        return list(together.items())


def short(names: Sequence[str]) -> list[str]:
    """Return the last part of each name, or the whole where two end alike."""
    last = [name.removesuffix(".bias").rpartition(".")[2] + (".bias" if name.endswith(".bias") else "") for name in names]
    return [one if last.count(one) == 1 else name for one, name in zip(last, names, strict=True)]


def sentence(selection: Selection, layout: Layout, parameters: int | None) -> str:
    """Say how much is chosen."""
    count, touched = selection.count(), len({block for block, _ in layout.cells if block is not None})
    of = f" of {parameters:,} ({count / parameters:.3%})" if parameters else ""
    return f"{count:,} entries{of} in {len(selection.parts)} parameters of {touched} of {layout.blocks} blocks"


def size_of_base(folder: Path) -> tuple[int | None, int | None]:
    """Return how many blocks and parameters a run's base has; None for what is no run."""
    run = Run(folder)
    if not run.has("scores.json"):
        return None, None
    scores = run.read("scores.json", Scores)
    return len(scores.blocks), scores.total_parameters


def write_picture(selection: Selection, title: str, path: Path, blocks: int | None = None, parameters: int | None = None) -> Path:
    """Write a page (``.html``) or only the picture (``.svg``)."""
    layout = Layout.of(selection, blocks)
    picture = charts.heat(
        layout.shares(),
        [str(block) for block in range(layout.blocks)],
        short(layout.matrices()),
        "Share of each matrix of each block that may change",
        "block",
    )
    if path.suffix == ".svg":
        text = charts.standalone(picture)
    else:
        text = environment().get_template("selection.html").render(
            title=title,
            picture=picture,
            sentence=sentence(selection, layout, parameters),
            rows=layout.rows(),
        )  # fmt: skip
    write_atomically(path, text)
    return path


def show_selection(
    selection: Selection, title: str, blocks: int | None = None, parameters: int | None = None, console: Console | None = None
) -> None:
    """Show the share of each matrix of each block (neighbours that are alike in one row), then exact counts by matrix."""
    console, layout = console or Console(), Layout.of(selection, blocks)
    console.print(f"[bold]{escape(title)}[/]: {sentence(selection, layout, parameters)}")
    if layout.matrices():
        table = Table(title="Share of each matrix, in %", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("block", no_wrap=True, justify="right")
        for name in short(layout.matrices()):
            table.add_column(escape(name), justify="right", overflow="fold")
        for first, last, row in _runs(layout.shares()):
            table.add_row(str(first) if first == last else f"{first}-{last}", *map(_shade, row))
        console.print(table)
    counts = Table(
        title="Entries, by matrix over the blocks that it is touched in",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("matrix", "chosen", "of", "share", "as"):
        counts.add_column(column, justify="left" if column in ("matrix", "as") else "right")
    for name, cell in layout.rows():
        counts.add_row(escape(name), f"{cell.chosen:,}", f"{cell.size:,}", f"{cell.share:.3%}", ", ".join(sorted(cell.forms)))
    console.print(counts)


def show_overlap(overlaps: dict[str, Overlap], names: tuple[str, str], console: Console | None = None) -> None:
    """Show what two selections have in common: by matrix over all blocks, and in all."""
    console = console or Console()
    table = Table(title=f"Overlap of {escape(names[0])} (A) and {escape(names[1])} (B)", title_justify="left", box=SIMPLE_HEAD,
                  padding=(0, 1, 0, 0))  # fmt: skip
    table.add_column("matrix")
    for column in ("A", "B", "both", "by chance", "of A", "of B", "Jaccard"):
        table.add_column(column, justify="right", no_wrap=True)
    groups: dict[str, list[Overlap]] = {}
    for name, each in overlaps.items():
        groups.setdefault(place_of(name)[1], []).append(each)
    for name, each in [*((name, total(group)) for name, group in groups.items()), ("all", total(overlaps.values()))]:
        table.add_row(
            f"[bold]{escape(name)}[/]" if name == "all" else escape(name),
            f"{each.one:,}",
            f"{each.other:,}",
            f"{each.both:,}",
            f"{each.by_chance:,.0f}",
            f"{each.share_of_one:.1%}",
            f"{each.share_of_other:.1%}",
            f"{each.jaccard:.3f}",
        )
    console.print(table)
    console.print("by chance: what two random choices of these sizes, each within these parameters, would share", style="dim")


def _runs(rows: Sequence[list[float]]) -> list[tuple[int, int, list[float]]]:
    """Return runs of equal rows: first, last, row."""
    runs: list[tuple[int, int, list[float]]] = []
    for index, row in enumerate(rows):
        if runs and runs[-1][2] == row:
            runs[-1] = (runs[-1][0], index, row)
        else:
            runs.append((index, index, row))
    return runs


def _shade(share: float) -> str:
    if not share:
        return "[dim]·[/]"
    text = f"{share * 100:.3g}"
    return f"[bold]{text}[/]" if share > 0.5 else text
