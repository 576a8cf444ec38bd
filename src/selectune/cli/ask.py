"""The command that asks a specialist, or the one of several that knows: ``selectune ask``.

Knows: its options, and how an answer is shown. Does not know: how it is made.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer


def ask(
    run: Annotated[Path, typer.Argument(help="A run folder, such as runs/examples-lora.", show_default=False)],
    question: Annotated[str, typer.Argument(help="What to ask.", show_default=False)],
    adapt: Annotated[
        str | None,
        typer.Option(help="Records to learn from for this one question: a file, folder, glob or hub id. Afterwards the specialist is what it was."),
    ] = None,
    among: Annotated[
        list[Path] | None,
        typer.Option(help="Another run on the same base; may be repeated. Whose training the question is like, answers; the base, if none."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Learn from at most so many records, a step each.")] = 50,
    alpha: Annotated[float, typer.Option(help="Fewer steps the larger it is: step n while the uncertainty is at most 1 / (alpha n).")] = 0.2,
    learning_rate: Annotated[float | None, typer.Option(help="Of these steps; left out: half of the form's own.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="A column's role: question=COLUMN. May be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, and the answer alone.")] = False,
) -> None:  # fmt: skip
    """Ask a specialist; with --adapt, after it has learnt from the records that leave least uncertainty about the question; with --among, the
    one of several that knows.

    ```
    selectune ask runs/manual-lora "What does fault 17 mean?"
    selectune ask runs/manual-lora "What does fault 17 mean?" --adapt notes.jsonl
    selectune ask runs/manual-lora "What does fault 17 mean?" --among runs/law-lora --among runs/medicine-lora
    ```
    """
    import json

    from selectune.cli.options import pairs
    from selectune.inference.test_time import Answer, Settings, Specialist, say
    from selectune.run import Run

    settings = Settings(steps=steps, alpha=alpha, learning_rate=learning_rate)
    asked: Run | None = Run.open(run)
    who: dict[str, str] = {}
    if among:
        from selectune.inference.among import BASE, Among

        several = Among([Run.open(each) for each in (run, *among)], quiet or as_json)
        asked = several.choose(question)
        who = {"from": BASE if asked is None else asked.name}
    if asked is None:
        found = Answer(say(several.base.model, several.base.tokenizer, several.encoder, question))
    else:
        found = Specialist(asked, adapt, pairs(column), quiet or as_json).answer(question, settings)
    if as_json:
        told = {**who, **asdict(found), "records": [record.place for record in found.records]}
        typer.echo(json.dumps(told, indent=1, ensure_ascii=False))
    elif found.without is None or quiet:
        if who and not quiet:
            typer.echo(f"{who['from']} answers:", err=True)
        typer.echo(found.text)
    else:
        _show(found)


def _show(found: Any) -> None:
    """Both answers, and what was learnt in between."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.markup import escape
    from rich.panel import Panel

    console, steps = Console(), len(found.records)
    shown = [Panel(escape(found.without), title="specialist")]
    if steps:
        shown.append(Panel(escape(found.text), title="after learning", border_style="green"))
    console.print(Columns(shown, equal=True, expand=True))
    left = f"uncertainty {found.uncertainty[0]:.2f} -> {found.uncertainty[-1]:.2f}"
    places = list(dict.fromkeys(record.place for record in found.records))
    console.print(
        f"{steps} step{'s' * (steps != 1)}, {left}"
        + (f": {', '.join(places[:5])}{', ...' * (len(places) > 5)}" if places else "")
    )
