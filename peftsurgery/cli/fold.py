"""``peftsurgery fold``: write the model with what was sewn in folded into its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click

from peftsurgery.cli.kit import clean, json_option, print_json
from peftsurgery.cli.output import check_free, force_option, fresh, output_option
from peftsurgery.cli.progress import doing


@click.command()
@click.argument("surgery", metavar="SURGERY|PEFT_DIR")
@click.option("--base", metavar="DIR", help="The base model, if it is not where it was.")
@output_option
@click.option(
    "--onnx",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also write ONNX, checked in onnxruntime at two unseen shapes.",
)
@click.option("--verify", is_flag=True, help="Reload the result and compare its outputs.")
@force_option
@json_option
def fold(
    surgery: str,
    base: str | None,
    out: Path | None,
    onnx: Path | None,
    verify: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Fold a saved surgery or a peft adapter into its base and write a plain model to OUT."""
    if out is None:
        raise click.UsageError("missing option --output OUT")
    inputs = [surgery, *([base] if base else [])]
    from peftsurgery.formats.pretrained import fold_to_directory

    with fresh(out, inputs, force) as part, beside(onnx, out, part, inputs, force) as file:
        with doing(f"folding {surgery}"):
            result = fold_to_directory(surgery, part, base=base, onnx=file, verify=verify)
        if result.onnx is not None and file != onnx:
            result = replace(result, onnx=result.onnx.moved(str(onnx)))
    if as_json:
        print_json({**result.to_dict(), "out": str(out)})
    else:
        click.echo(clean(str(result)))
        click.echo(f"folded model in {out}")


@contextmanager
def beside(
    onnx: Path | None, out: Path, part: Path, inputs: Sequence[str], force: bool
) -> Iterator[Path | None]:
    """Where the ONNX file is written: within OUT it comes and goes with it, elsewhere by itself."""
    if onnx is None:
        yield None
        return
    inner = onnx.resolve()
    if out.resolve() in inner.parents:
        yield part / inner.relative_to(out.resolve())
        return
    check_free(onnx, inputs, force)
    yield onnx
