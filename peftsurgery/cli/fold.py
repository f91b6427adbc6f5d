"""``peftsurgery fold``: write the model with what was sewn in folded into its weights."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import click

from peftsurgery.cli.kit import (
    force_option,
    json_option,
    name_option,
    other_base_option,
    output_option,
    print_result,
)
from peftsurgery.cli.progress import doing
from peftsurgery.outputs import check_free, fresh


@click.command()
@click.argument("surgery", metavar="SURGERY|PEFT_DIR")
@click.option("--base", metavar="DIR", help="The base model, if it is not where it was.")
@click.option(
    "--class",
    "kind",
    metavar="NAME",
    help="Read the base as this class of transformers, not as the adapter or the base says.",
)
@output_option()
@name_option(
    "Fold this adapter; those that were active when the surgery was saved unless given.",
    multiple=True,
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
@click.option(
    "--stream",
    is_flag=True,
    help="Fold the base's files a few rows at a time, without building the model.",
)
@click.option(
    "--dtype",
    metavar="DTYPE",
    help="With --stream: write float32, bfloat16 or float16 instead of the base's dtype.",
)
@click.option("--resume", is_flag=True, help="With --stream: go on with a run that was broken off.")
@click.option(
    "--reversible",
    is_flag=True,
    help="With --stream: also write what `unfold` restores the base from, without the base.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what a fold of files would read, write, compute and need; write nothing.",
)
@other_base_option
@force_option
@json_option
def fold(
    surgery: str,
    base: str | None,
    kind: str | None,
    out: Path,
    name: tuple[str, ...],
    onnx: Path | None,
    requantise: bool,
    verify: bool,
    stream: bool,
    dtype: str | None,
    resume: bool,
    reversible: bool,
    dry_run: bool,
    allow_other_base: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Fold a saved surgery or a peft adapter into its base and write a plain model to OUT."""
    if stream or dry_run:
        if kind or name or onnx or requantise or verify or force:
            raise click.UsageError("--stream goes only with --base, and with options that say so")
        where = (surgery, base, out, dtype)
        _on_files(where, resume, reversible, allow_other_base, dry_run, as_json)
        return
    if dtype or resume or reversible:
        raise click.UsageError("--dtype, --resume and --reversible go with --stream")
    if onnx is not None and requantise:
        raise click.UsageError("--onnx cannot go with --requantise: ONNX has no such layers")
    inputs, inside = [surgery, *([base] if base else [])], onnx and _inside(onnx, out)
    if onnx is not None and inside is None:
        check_free(onnx, inputs, force)
    from peftsurgery.formats.pretrained import fold_to_directory

    with fresh(out, inputs, force) as part, doing(f"folding {surgery}"):
        file = onnx if inside is None else part / inside
        result = fold_to_directory(
            surgery,
            part,
            base=base,
            onnx=file,
            verify=verify,
            adapters=name,
            requantise=requantise,
            allow_other_base=allow_other_base,
            kind=kind,
        )
    if result.onnx is not None:
        result = replace(result, onnx=result.onnx.moved(str(onnx)))
    words = f"{result}\nfolded model in {out}"
    print_result({**result.to_dict(), "out": str(out)}, words, as_json)


def _on_files(
    where: tuple[str, str | None, Path, str | None],
    resume: bool,
    reversible: bool,
    allow_other_base: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fold on files, or say what that would take."""
    from peftsurgery.formats.streamed_fold import estimate_fold, fold_checkpoint

    if dry_run:
        found = estimate_fold(*where, reversible, allow_other_base)
        print_result(found.to_dict(), found, as_json)
        return
    with doing(f"folding {where[0]}"):
        report = fold_checkpoint(*where, resume, reversible, allow_other_base)
    print_result(report.to_dict(), report, as_json)


def _inside(file: Path, out: Path) -> Path | None:
    """The name beneath OUT of an ONNX file that is asked for inside it; None for one elsewhere.

    It is written where OUT is being made. `OUT/../elsewhere` is elsewhere.
    """
    real, whole = Path(os.path.realpath(file)), Path(os.path.realpath(out))
    return real.relative_to(whole) if real.is_relative_to(whole) else None
