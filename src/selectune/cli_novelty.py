"""The command on what was learnt: ``selectune novelty``.

Knows: its options, and what a person is shown. Does not know: how a text is found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def novelty(
    run: Annotated[Path, typer.Argument(help="A run folder, such as runs/examples-lora.", show_default=False)],
    rounds: Annotated[int, typer.Option(min=1, help="How many texts.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="Of each text.")] = 64,
    ask: Annotated[
        str | None, typer.Option(help="A question: texts are answers to it. Left out: texts begin where every text begins.")
    ] = None,
    contrast: Annotated[float, typer.Option(min=0, help="How much the base counts against a word; 0: the specialist alone.")] = 1.0,
    plausible: Annotated[float, typer.Option(min=0, max=1, help="Share of the likeliest word's probability that a word must have.")] = 0.1,
    beams: Annotated[int, typer.Option(min=1, help="Texts drawn side by side.")] = 4,
    static: Annotated[bool, typer.Option("--static", help="Do not teach the base what was shown: texts may repeat each other.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the texts, as JSON lines.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
) -> None:  # fmt: skip
    """Show what a specialist learnt that its base does not say: texts, likely for one and not for the other.

    An audit of leaks and side effects: what the training data brought, without looking at them.
    """
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.markup import escape

    from selectune.errors import UserError
    from selectune.evaluation.novelty import Novelty, novelties_of
    from selectune.run import Run, write_atomically

    if out is not None and not out.absolute().parent.is_dir():
        raise UserError("its folder does not exist", file=out, mend="make it, or name another file")
    how = Novelty(rounds, tokens, plausible, contrast, beams, not static)
    console, lines = Console(), ""
    for found in novelties_of(Run.open(run), how, ask=ask, seed=seed):
        console.print(f"[bold]{found.contrast:+.2f}[/] nats per token  {escape(' '.join(found.text.split()))}\n")
        lines += json.dumps(asdict(found) | {"contrast": found.contrast}, ensure_ascii=False) + "\n"
        if out is not None:
            write_atomically(out, lines)
