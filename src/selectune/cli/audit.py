"""The commands on what was learnt besides: ``selectune novelty`` and ``selectune drift``.

Knows: their options, and what a person is shown. Does not know: how a text is found, or how drift is measured.
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
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of what is drawn.")] = 0,
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


def drift(
    run: Annotated[Path, typer.Argument(help="A run folder, such as runs/examples-lora.", show_default=False)],
    prompts: Annotated[int, typer.Option(min=1, help="How many of the built-in general prompts are answered, at most 40.")] = 40,
    steps: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 64,
    threshold: Annotated[
        float, typer.Option(help="Log-odds, in nats, from which on a token counts as one of the domain's.")
    ] = 2.0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Show how far a specialist's answers to general prompts have drifted towards the words of its domain.

    The words: what the training records' responses use much more than general text. The drift: how much more probability the specialist gives
    them than its base does, step by step, while each answers prompts that have nothing to do with the domain.
    """
    from rich.console import Console
    from rich.markup import escape

    from selectune.evaluation.drift_probe import drift_of
    from selectune.run import Run

    found = drift_of(Run.open(run), prompts, steps, threshold, quiet)
    console = Console()
    shown = "  ".join(escape(repr(word)) for word in found.words[:12])
    console.print(f"{len(found.words):,} tokens are the domain's, most of all {shown}\n")
    for what in ("total", "largest"):
        before, after = (sum(getattr(one, what) for one in masses) / len(masses) for masses in (found.base, found.specialist))
        low, high = found.interval(what)
        said = "all of them together" if what == "total" else "the likeliest of them"
        console.print(
            f"{said:<22} base {before:.4f}  specialist {after:.4f}  [bold]{after - before:+.4f}[/] ({low:+.4f} to {high:+.4f}, 95 %)"
        )
