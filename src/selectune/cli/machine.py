"""The commands on the installation: ``selectune doctor`` and ``selectune version``.

Knows: their names. Does not know: how a machine is measured.
"""

from __future__ import annotations

import typer

from selectune import __version__


def doctor() -> None:
    """Say what this machine can do."""
    from selectune.models import doctor as look
    from selectune.reporting.terminal import show_doctor

    show_doctor(look())


def version() -> None:
    """Print the version."""
    typer.echo(__version__)
