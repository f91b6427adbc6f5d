"""``peftsurgery diff``: what is different between two models."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftsurgery.cli.kit import clean, force_option, json_option
from peftsurgery.cli.progress import doing
from peftsurgery.outputs import fresh

if TYPE_CHECKING:
    from peftsurgery.capture import GraphModel
    from peftsurgery.diff.comparison import Diff

FORMATS = ("text", "json", "md", "html")
CONFIG, ADAPTERS = "config.json", ("surgery.json", "adapter_config.json")
PARTS = ("structure", "weights", "config")


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B", required=False)
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", help="How to say it.")
@click.option(
    "-o", "--output", "out", metavar="FILE", type=click.Path(path_type=Path),
    help="Write it to this file, which must not exist, and not to stdout.",
)  # fmt: skip
@click.option("--weights", is_flag=True, help="Compare the weights too, tensor by tensor.")
@click.option(
    "--fail-on", "fatal", multiple=True, type=click.Choice(PARTS),
    help="Exit with 1 only if this differs; for several give it again. Everything unless given.",
)  # fmt: skip
@click.option("--base", metavar="DIR", help="The base of an adapter, if not where it says.")
@click.option(
    "--shape", nargs=2, type=click.IntRange(min=1), metavar="BATCH TOKENS",
    help="Count FLOPs and activations of a forward of this shape.",
)  # fmt: skip
@click.option("--all", "whole", is_flag=True, help="Show all changes, though they fill screens.")
@click.option(
    "--describe", is_flag=True, help="Print what is in the safetensors file A, a line for a tensor."
)
@force_option
@json_option
def diff(
    a: str,
    b: str | None,
    form: str,
    out: Path | None,
    weights: bool,
    fatal: tuple[str, ...],
    base: str | None,
    shape: tuple[int, int] | None,
    whole: bool,
    describe: bool,
    force: bool,
    as_json: bool,
) -> int | None:
    """Say what is different between the models A and B; exit with 1 if anything is.

    A and B are what MODEL is elsewhere: model directories, hub ids, package.module:factory, saved
    surgeries; directories of peft and AdapterHub adapters; ONNX files; or two rule files (or names
    of shipped ones), or two safetensors files. Without --weights no weights are read.
    `diff --describe A` is for git's textconv.
    """
    if describe:
        _describe(Path(a))
        return None
    if b is None:
        raise click.UsageError("missing argument B")
    if "weights" in fatal and not weights:
        raise click.UsageError("--fail-on weights needs --weights")
    from peftsurgery.diff.comparison import diff as compared

    with doing(f"comparing {a} and {b}"):
        one, other = (_opened(each, base) for each in (a, b))
        found = compared(one, other, weights=weights, shape=shape)
        found = found.named(a, b)
    text = shown(found, "json" if as_json else form, to_terminal=out is None, whole=whole)
    if out is None:
        click.echo(text)
    else:
        with fresh(out, [a, b], force) as part:
            part.write_text(text + "\n", encoding="utf-8")
    return int(any(found.summary.differs[part] for part in fatal or PARTS))


def _opened(spec: str, base: str | None) -> GraphModel | str:
    """An adapter's directory opened on its base; what is a model by itself as it is."""
    own, *adapters = (os.path.isfile(os.path.join(spec, file)) for file in (CONFIG, *ADAPTERS))
    if own or not any(adapters):
        return spec
    from peftsurgery.formats.pretrained import open_adapter

    return open_adapter(Path(spec), base)


def _describe(file: Path) -> None:
    """Print a line for each tensor of a safetensors file: name, dtype, shape, a hash."""
    from peftsurgery.fingerprint import in_file

    for name, tensor in sorted(in_file(file).items()):
        click.echo(f"{clean(name)} {tensor.print()}")


def shown(found: Diff, form: str, to_terminal: bool = True, whole: bool = False) -> str:
    """A difference in one of :data:`FORMATS`; text for a terminal fits it, unless ``whole``."""
    if form == "json":
        return json.dumps(found.to_dict(), indent=2, ensure_ascii=False, default=str)
    if form == "md":
        return found.to_markdown().rstrip("\n")
    if form == "html":
        return found.to_html().rstrip("\n")
    from peftsurgery.diff.text import rendered

    is_terminal = to_terminal and sys.stdout.isatty()
    if not is_terminal:
        return rendered(found.summary, 1000)
    # a terminal folds lines at its width; a pipe gets them whole
    height = None if whole else shutil.get_terminal_size().lines
    return rendered(found.summary, colour=True, height=height)
