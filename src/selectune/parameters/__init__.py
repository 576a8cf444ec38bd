"""Which weights may change? One file per method; every method fills a ``Selection``."""

from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection

__all__ = ["Context", "ParameterMethod", "Selection"]
