"""``python -m selectune``: the command line."""

from selectune.cli import main

main()
