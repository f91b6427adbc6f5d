"""What commands are made of: groups that suggest, and the one place where errors get exit codes.

A command prints its result on stdout, as text or with ``--json`` as one JSON document. It returns
an exit code, or None for success, or raises. What it raises ends here: as text on stderr, or with
``--json`` as an object with the key ``error`` on stdout.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from peftsurgery.errors import SurgeryError, closest

INTERRUPTED, READER_GONE = 130, 141  # 128 and the signal, as shells count

# The packages that come with an extra, as `import` names them.
EXTRAS = {
    "peft": "peft",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "gguf": "models",
    "bitsandbytes": "quantise",
    "fsspec": "remote",
    "s3fs": "remote",
}

other_base_option = click.option(
    "--allow-other-base",
    is_flag=True,
    help="Take a base with other weights than the adapter was made for, and say so.",
)
force_option = click.option("--force", is_flag=True, help="Replace OUT if it exists.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def output_option(required: bool = True, kind: click.Path | None = None) -> Callable[[Any], Any]:
    """The option for what is written, which is called the same in every command."""
    return click.option(
        *("-o", "--output", "out"), metavar="OUT", required=required,
        type=kind or click.Path(path_type=Path),
        help="The directory to write; it must not exist.",
    )  # fmt: skip


def name_option(help_text: str, **attributes: Any) -> Callable[[Any], Any]:
    """The option for an adapter's name, which is called the same in every command."""
    return click.option("--name", "--adapter", metavar="ADAPTER", help=help_text, **attributes)


class Group(click.Group):
    """A group of commands that names the nearest right one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first argument names; PSG901 if there is none."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = closest(args[0], self.list_commands(ctx))
            hint = f"did you mean '{ctx.command_path} {near}'?" if near else _see_help(ctx)
            raise SurgeryError("PSG901", f"there is no command '{args[0]}'", hint)
        return super().resolve_command(ctx, args)


class ReaderGoneError(Exception):
    """What a BrokenPipeError becomes on its way through click, which would exit with 1 for it."""


class Root(Group):
    """The group at the top: it translates what its commands raise."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """The context of a run; ``--help`` and ``--version`` print while it is made."""
        try:
            return super().make_context(*args, **extra)
        except BrokenPipeError:
            raise ReaderGoneError from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise ReaderGoneError from None

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run, print errors and exit; however it was called, its name is ``peftsurgery``.

        Takes what ``click.Command.main`` takes, of which ``args`` (the command line) is used.
        """
        given = args[0] if args else extra.get("args")
        arguments = [str(word) for word in (sys.argv[1:] if given is None else given)]
        run = super().main
        sys.exit(
            translate(
                lambda: run(arguments, "peftsurgery", standalone_mode=False),
                as_json="--json" in arguments,
            )
        )


def translate(run: Callable[[], Any], as_json: bool) -> int:
    """The exit code of a command, once what it raised has been printed.

    It is that of a program ended by SIGPIPE if the reader goes away, of an error's text too.
    """
    try:
        return _translate(run, as_json)
    except (BrokenPipeError, ReaderGoneError):
        # Python would complain once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE


def _translate(run: Callable[[], Any], as_json: bool) -> int:
    try:
        code = run()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        return _fail({"error": {"code": None, "message": "interrupted"}}, "interrupted", as_json)
    except (SurgeryError, click.UsageError, OSError, ModuleNotFoundError) as error:
        refusal = _refusal(error)
        _fail(refusal.to_dict(), f"error: {refusal}", as_json)
        return refusal.exit_code
    return code if isinstance(code, int) else 0


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_result(document: Any, words: object, as_json: bool) -> None:
    """Print a result on stdout: one JSON document, or the same in words."""
    if as_json:
        print_json(document)
    else:
        click.echo(clean(str(words)))


def clean(text: str) -> str:
    """``text`` with control characters spelt out: names from a file must not drive the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _refusal(error: Exception) -> SurgeryError:
    if isinstance(error, SurgeryError):
        return error
    if isinstance(error, click.UsageError):
        return SurgeryError("PSG901", _first_lower(error.format_message()), _see_help(error.ctx))
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise error
        hint = f"pip install 'peftsurgery[{EXTRAS[package]}]'"
        return SurgeryError("PSG902", f"the package '{package}' is not installed", hint)
    assert isinstance(error, OSError)
    reason = error.strerror or str(error)
    return SurgeryError("PSG603", f"{error.filename}: {reason}" if error.filename else reason)


def _fail(document: dict[str, Any], text: str, as_json: bool) -> int:
    if as_json:
        print_json(document)
    else:
        click.echo(clean(text), err=True)
    return INTERRUPTED


def _see_help(ctx: click.Context | None) -> str:
    return f"see `{ctx.command_path if ctx else 'peftsurgery'} --help`"


def _first_lower(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")
