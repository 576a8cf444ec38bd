"""Which examples train? One file per method; every method fills a ``Choice``."""

from selectune.examples.method import Choice, ExampleMethod
from selectune.examples.pool import Pool

__all__ = ["Choice", "ExampleMethod", "Pool"]
