"""What does a person see? One self-contained page per run, one per comparison, and the terminal."""

from selectune.reporting.compare import write_comparison
from selectune.reporting.report import write_report

__all__ = ["write_comparison", "write_report"]
