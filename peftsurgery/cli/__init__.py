"""The ``peftsurgery`` command: a file for each, with its arguments, progress and printing."""

from peftsurgery.cli.root import main

__all__ = ["main"]
