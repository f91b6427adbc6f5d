"""The group of all commands, and the entry point."""

from __future__ import annotations

import atexit
import gc
import signal
import sys
from types import FrameType

import click

from peftsurgery.cli.apply import apply
from peftsurgery.cli.check import check
from peftsurgery.cli.diff import diff
from peftsurgery.cli.doctor import doctor
from peftsurgery.cli.explain import explain
from peftsurgery.cli.export import export
from peftsurgery.cli.extract import extract
from peftsurgery.cli.fold import fold
from peftsurgery.cli.import_ import import_
from peftsurgery.cli.inspect import inspect
from peftsurgery.cli.kit import Root
from peftsurgery.cli.merge import merge
from peftsurgery.cli.rules import rules
from peftsurgery.cli.unfold import unfold
from peftsurgery.cli.verify import verify
from peftsurgery.cli.why import why
from peftsurgery.version import __version__

EPILOG = (
    "MODEL is a model directory, a hub id (owner/name), package.module:factory, "
    "or a saved surgery. RULE is a shipped rule's name or a YAML file. "
    "Exit codes: 0 ok, 1 no match or a difference, 2 usage, 3 bad input, 4 verification failed, "
    "130 interrupted."
)


@click.group(cls=Root, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="peftsurgery")
def root() -> None:
    """Operate on models as graphs: rules say where to cut, what to sew in and how it folds back."""


for command in (
    apply,
    fold,
    unfold,
    verify,
    export,
    import_,
    extract,
    merge,
    check,
    diff,
    inspect,
    why,
    rules,
    explain,
    doctor,
):
    root.add_command(command)


def main() -> None:
    """Run the command on the process's arguments and exit."""
    signal.signal(signal.SIGTERM, _terminated)
    # Imports make many objects that stay: looking through them for garbage, at each few hundred and
    # again at the end, takes a quarter of the time of a short command.
    gc.set_threshold(20_000)
    atexit.register(gc.freeze)
    root.main()


def _terminated(number: int, frame: FrameType | None) -> None:
    # An exception, and not the default, lets unfinished output be removed.
    sys.exit(128 + number)
