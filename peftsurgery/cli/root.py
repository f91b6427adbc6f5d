"""The group of all commands, and the entry point."""

from __future__ import annotations

import atexit
import gc
import importlib
import keyword
import os
import signal
import sys
from types import FrameType

import click

from peftsurgery.cli.kit import Root
from peftsurgery.version import __version__

EPILOG = (
    "MODEL is a model directory, a hub id (owner/name), package.module:factory, "
    "or a saved surgery. RULE is a shipped rule's name or a YAML file. "
    "Exit codes: 0 ok, 1 no match or a difference, 2 usage, 3 bad input, 4 verification failed, "
    "130 interrupted."
)


COMMANDS = (
    *("apply", "check", "diff", "doctor", "explain", "export", "extract", "fold", "import"),
    *("inspect", "merge", "rules", "unfold", "verify", "why"),
)
"""The commands. Each is a function of its name in a file of its name, `import_` for a keyword."""


class _Commands(Root):
    """The group at the top, which imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return sorted({*COMMANDS, *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name; None if there is none."""
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            own = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
            self.add_command(getattr(importlib.import_module(f"{__package__}.{own}"), own))
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="peftsurgery")
def root() -> None:
    """Operate on models as graphs: rules say where to cut, what to sew in and how it folds back."""


def main() -> None:
    """Run the command on the process's arguments and exit."""
    signal.signal(signal.SIGTERM, _terminated)
    # pydantic would look for plugins in the metadata of every package that is installed
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # Imports make many objects that stay: looking through them for garbage at each few hundred
    # takes a quarter of the time of a short command.
    gc.set_threshold(100_000)
    code = 1  # of an exception that nothing has caught

    def leave() -> None:
        os._exit(code if _flushed() else 120)

    # What is registered first is called last. Then there is nothing to do but to take all objects
    # apart one by one, which the system does at once.
    atexit.register(leave)
    try:
        root.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


def _flushed() -> bool:
    """Whether all that was printed could be written; Python ends with 120 if it could not."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # closed by whoever reads, or here
        return False
    return True


def _terminated(number: int, frame: FrameType | None) -> None:
    # An exception, and not the default, lets unfinished output be removed.
    sys.exit(128 + number)
