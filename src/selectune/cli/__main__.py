"""``python -m selectune.cli``."""

from selectune.cli import main

main()
