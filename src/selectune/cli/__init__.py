"""The command line: a file for each family of commands.

Knows: which commands there are, and exit statuses: 0 done, 2 a mistake in the input (one line), 3 something was lost and retention was
required, 4 a plan exceeds a budget, 130 interrupted with a checkpoint. Does not know: how anything is done.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

import typer

from selectune.cli import ask, audit, domains, examples, experiment, machine, methods, recipe, runs, selection, specialize
from selectune.errors import EXIT_INTERRUPTED, EXIT_MISTAKE, UserError, unwritable

app = typer.Typer(
    help="Turn a small language model into your domain's specialist: change only what matters, and prove that nothing else "
    "was lost.\n\nStart with: selectune specialize examples.jsonl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
_PANELS: dict[str, tuple[Callable[..., None] | typer.Typer, ...]] = {
    "Make a specialist": (specialize.demo, specialize.specialize, specialize.plan, specialize.resume, recipe.init, recipe.recipe_command),
    "Use it, look into it": (
        runs.runs, runs.report, runs.compare, runs.chat, ask.ask, runs.export, audit.novelty, audit.drift,
        selection.selection_app, selection.delta_app,
    ),
    "Choose data": (examples.select, domains.domains),
    "Methods": (methods.methods_app, experiment.experiment),
    "This installation": (machine.doctor, machine.version),
}  # fmt: skip
for panel, commands in _PANELS.items():
    for command in commands:
        if isinstance(command, typer.Typer):
            app.add_typer(command, rich_help_panel=panel)
        else:
            app.command(command.__name__.removesuffix("_command"), rich_help_panel=panel)(command)


def main_without_exit() -> None:
    """Run the command line and return, for callers that go on afterwards."""
    app(standalone_mode=False)


def main() -> None:
    """Run the command line; a user's mistake is one line and status 2, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about their next versions: nobody here can mend them
    try:
        app()
    except UserError as error:
        print(f"selectune: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except MemoryError:
        print(
            "selectune: out of memory; to mend it: train with half the training.micro_batch_sequences, or take fewer records",
            file=sys.stderr,
        )
        sys.exit(EXIT_MISTAKE)
    except SystemExit as ended:
        if isinstance(
            getattr(ended.__context__, "__cause__", None), KeyboardInterrupt
        ):  # Ctrl-C, which typer makes a silent exit of
            print(
                "selectune: stopped; a run goes on with `selectune resume RUN`, and what --kept holds is not measured again",
                file=sys.stderr,
            )
        raise
    except Exception as error:
        if (why := unwritable(error)) is not None:
            print(f"selectune: {getattr(error, 'filename', None) or 'the disk'}: {why}; to mend it: free space or name another --output, "
                  "then `selectune resume`", file=sys.stderr)  # fmt: skip
            sys.exit(EXIT_MISTAKE)
        if type(error).__name__ != "Interrupted":
            raise
        print(f"selectune: {error}; go on with `selectune resume RUN` (see `selectune runs`)", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
