"""``peftsurgery fold``: write the model with what was sewn in folded into its weights."""

from __future__ import annotations

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
    "--adapter",
    "adapters",
    metavar="NAME",
    multiple=True,
    help="Fold this adapter; those that were active when the surgery was saved unless given.",
)
@click.option(
    "--onnx",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also write ONNX, checked in onnxruntime at two unseen shapes.",
)
@click.option(
    "--requantise", is_flag=True, help="Write what the surgery keeps in four bits in four bits."
)
@click.option("--verify", is_flag=True, help="Reload the result and compare its outputs.")
@force_option
@json_option
def fold(
    surgery: str,
    base: str | None,
    out: Path | None,
    adapters: tuple[str, ...],
    onnx: Path | None,
    requantise: bool,
    verify: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Fold a saved surgery or a peft adapter into its base and write a plain model to OUT."""
    if out is None:
        raise click.UsageError("missing option --output OUT")
    if onnx is not None and requantise:
        raise click.UsageError("--onnx cannot go with --requantise: ONNX has no such layers")
    inputs = [surgery, *([base] if base else [])]
    # An ONNX file asked for inside OUT is written where OUT is being made.
    inside = onnx is not None and onnx.absolute().is_relative_to(out.absolute())
    if onnx is not None and not inside:
        check_free(onnx, inputs, force)
    from peftsurgery.formats.pretrained import fold_to_directory

    with fresh(out, inputs, force) as part, doing(f"folding {surgery}"):
        file = part / onnx.absolute().relative_to(out.absolute()) if onnx and inside else onnx
        result = fold_to_directory(
            surgery,
            part,
            base=base,
            onnx=file,
            verify=verify,
            adapters=adapters,
            requantise=requantise,
        )
    if result.onnx is not None:
        result = replace(result, onnx=result.onnx.moved(str(onnx)))
    if as_json:
        print_json({**result.to_dict(), "out": str(out)})
    else:
        click.echo(clean(str(result)))
        click.echo(f"folded model in {out}")
