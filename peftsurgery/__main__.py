"""``python -m peftsurgery``: the command."""

from peftsurgery.cli import main

main()
