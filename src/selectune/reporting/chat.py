"""Ask the base and the specialist, side by side. Knows: the terminal's turn-taking. Does not know: how answers are made."""

from __future__ import annotations

from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from selectune.data.chat import Encoder
from selectune.data.records import Message
from selectune.run import Run


class Pair:
    """A run's base and specialist, ready to answer."""

    def __init__(self, run: Run) -> None:
        from selectune.adapters import side_by_side
        from selectune.evaluation.scorer import Scorer

        recipe = run.recipe
        base, specialist = side_by_side(run)
        self._encoder = Encoder(base.tokenizer, recipe.data.max_length, system=recipe.data.system)
        self._scorers = [Scorer(model, base.tokenizer) for model in (base.model, specialist)]
        self._histories: list[list[Message]] = [[], []]

    def ask(self, question: str, max_new_tokens: int = 200) -> tuple[str, str]:
        """Return the base's and the specialist's answers; each remembers its own conversation."""
        answers = []
        for scorer, history in zip(self._scorers, self._histories, strict=True):
            history.append(Message("user", question))
            answer = scorer.generate([self._encoder.prompt_ids(tuple(history))], max_new_tokens)[0].strip()
            history.append(Message("assistant", answer))
            answers.append(answer)
        return answers[0], answers[1]

    def reset(self) -> None:
        """Forget the conversation."""
        self._histories = [[], []]


def chat(run: Run, question: str | None = None, console: Console | None = None) -> None:
    """Talk until ``/quit`` or the end of input; with a question, answer it and end."""
    console = console or Console()
    pair: Any = Pair(run)
    if question is not None:
        _show(console, *pair.ask(question))
        return
    console.print("Ask; /reset forgets the conversation, /quit ends.")
    while True:
        try:
            text = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/quit":
            return
        if text == "/reset":
            pair.reset()
        elif text:
            _show(console, *pair.ask(text))


def _show(console: Console, before: str, after: str) -> None:
    panels = [Panel(escape(before), title="base"), Panel(escape(after), title="specialist", border_style="green")]
    console.print(Columns(panels, equal=True, expand=True))
