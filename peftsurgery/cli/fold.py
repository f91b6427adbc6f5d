"""``peftsurgery fold``: write the model with what was sewn in folded into its weights.

Where the base is a directory of safetensors, its files are folded a few rows at a time. What that
cannot do (ONNX, a surgery in four bits) is done on the model in memory.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from peftsurgery.buffers import give_buffers_back, keep_buffers
from peftsurgery.checkpoint.copied_ahead import copying_ahead
from peftsurgery.cli.kit import (
    force_option,
    json_option,
    name_option,
    other_base_option,
    output_option,
    print_result,
)
from peftsurgery.cli.progress import doing
from peftsurgery.errors import SurgeryError
from peftsurgery.outputs import check_free, fresh
from peftsurgery.places import named_in

NOT_ON_FILES, QUANTISED = "PSG416", "PSG215"


@dataclass(frozen=True)
class Asked:
    """What a run of the command was asked for: its arguments and options."""

    surgery: str
    base: str | None
    kind: str | None
    out: str | Path
    name: tuple[str, ...]
    onnx: Path | None
    requantise: bool
    verify: bool
    stream: bool
    dtype: str | None
    resume: bool
    reversible: bool
    dry_run: bool
    part: str | None
    finish: bool
    allow_unchanged: bool
    allow_other_base: bool
    force: bool
    as_json: bool

    @property
    def inputs(self) -> list[str]:
        """The places that are read."""
        return [self.surgery, *([self.base] if self.base else [])]

    @property
    def elsewhere(self) -> str | None:
        """A place that is a URL, if there is one."""
        return next((str(each) for each in (self.out, *self.inputs) if "://" in str(each)), None)

    @property
    def in_memory(self) -> str | None:
        """An option that is given and needs the whole model, if there is one."""
        given: dict[str, Any] = {"--class": self.kind, "--name": self.name, "--onnx": self.onnx}
        return next((option for option, value in given.items() if value), None)

    @property
    def by_files(self) -> str | None:
        """An option that is given and is about files alone, if there is one."""
        given = {"--stream": self.stream, "--dtype": self.dtype, "--resume": self.resume}
        given |= {"--reversible": self.reversible, "--dry-run": self.dry_run}
        given |= {"--part": self.part, "--finish": self.finish}
        return next((option for option, value in given.items() if value), None)


class _Output(click.Path):
    """A path, or a URL as it is written."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Leave a URL alone."""
        return value if "://" in str(value) else super().convert(value, param, ctx)


@click.command()
@click.argument("surgery", metavar="SURGERY|PEFT_DIR")
@click.option("--base", metavar="DIR", help="The base model, if it is not where it was.")
@click.option(
    "--class",
    "kind",
    metavar="NAME",
    help="Read the base as this class of transformers, not as the adapter or the base says.",
)
@output_option(kind=_Output(path_type=Path))
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
    "--requantise",
    is_flag=True,
    help="Quantise again what the base or the surgery keeps in fewer bits.",
)
@click.option("--verify", is_flag=True, help="Reload the result and compare its outputs.")
@click.option(
    "--stream",
    is_flag=True,
    help="Fold on the base's files or not at all; without it, in memory where that is needed.",
)
@click.option(
    "--dtype",
    metavar="DTYPE",
    help="Write float32, bfloat16 or float16 instead of the base's dtype.",
)
@click.option("--resume", is_flag=True, help="Go on with a run that was broken off.")
@click.option(
    "--reversible",
    is_flag=True,
    help="Also write what `unfold` restores the base from, without the base.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what a fold of files would read, write, compute and need; write nothing.",
)
@click.option(
    "--part",
    metavar="K/N",
    help="Write every N-th file of weights: N processes, with each K from 1 on, share a fold.",
)
@click.option(
    "--finish",
    is_flag=True,
    help="Finish a fold of which all parts are written; the last part does that by itself.",
)
@click.option(
    "--allow-unchanged",
    is_flag=True,
    help="Write the result of an adapter that changes nothing, such as an untrained one.",
)
@other_base_option
@force_option
@json_option
def fold(**given: Any) -> None:
    """Fold a saved surgery or a peft adapter into its base and write a plain model to OUT."""
    asked = Asked(**given)
    if asked.by_files and asked.in_memory:
        message = f"{asked.by_files} folds files, and {asked.in_memory} needs the model in memory"
        raise click.UsageError(message)
    if (asked.part or asked.finish) and asked.force:
        raise click.UsageError(
            "--force cannot go with --part: what is written belongs to others too"
        )
    here = asked.in_memory or ("--verify" if asked.verify else "--force" if asked.force else None)
    if asked.elsewhere and here:
        raise click.UsageError(f"{here} cannot go with '{asked.elsewhere}', which is not here")
    if asked.onnx is not None and asked.requantise:
        raise click.UsageError("--onnx cannot go with --requantise: ONNX has no such layers")
    if asked.by_files or asked.elsewhere or (asked.in_memory is None and _has_files(asked)):
        try:
            with _ahead(asked):
                _on_files(asked)
        except SurgeryError as error:
            if asked.by_files or asked.elsewhere or error.code != NOT_ON_FILES:
                raise
            _instead(asked, error)
    else:
        _in_memory(asked)


def _instead(asked: Asked, refusal: SurgeryError) -> None:
    """Fold in memory what files refuse; of a quantised base, which has no model there, say that."""
    try:
        _in_memory(asked, f"folded in memory: {refusal.message}")
    except SurgeryError as error:
        if error.code == QUANTISED:
            raise refusal from None
        raise


def _ahead(asked: Asked) -> AbstractContextManager[None]:
    """Copy what the adapter is not for while the rest is imported and read.

    Only for what is certain to be new and here: what is wrong with a place is found by the fold.
    Where all is imported already, there is nothing to wait for; and not every system has files
    without a name.
    """
    out, base = Path(asked.out), asked.base or next(named_in(Path(asked.surgery)), None)
    options = (asked.elsewhere, asked.dry_run, asked.resume, asked.part, asked.finish, asked.dtype)
    is_needless = "numpy" in sys.modules or not hasattr(os, "O_TMPFILE")
    if is_needless or any(options) or base is None or not os.path.isdir(base):
        return nullcontext()
    try:
        check_free(out, [*asked.inputs, base], asked.force)
    except SurgeryError:
        return nullcontext()
    return copying_ahead(Path(base), Path(asked.surgery), out.absolute().parent)


def _import_numpy() -> None:
    """Import numpy without threads of its own, unless they are asked for.

    A fold of files has one for each processor; numpy's would wait for work and take their time.
    """
    name = "OPENBLAS_NUM_THREADS"
    is_set = name in os.environ
    os.environ.setdefault(name, "1")
    importlib.import_module("numpy")
    if not is_set:
        del os.environ[name]  # torch reads it too, for what is done in memory


def _has_files(asked: Asked) -> bool:
    """Whether the base is a directory whose weights are safetensors files."""
    from peftsurgery.formats.placed import has_files

    return has_files(asked.surgery, asked.base)


def _on_files(asked: Asked) -> None:
    """Fold on files, or say what that would take."""
    _import_numpy()
    from peftsurgery.formats.streamed_fold import (
        check_comparable,
        checked_outputs,
        estimate_fold,
        fold_checkpoint,
    )

    if asked.elsewhere:
        give_buffers_back()
    else:
        keep_buffers()
    where, other = (asked.surgery, asked.base), asked.allow_other_base
    again = asked.requantise
    if asked.dry_run:
        found = estimate_fold(*where, asked.out, asked.dtype, asked.reversible, other, again)
        print_result(found.to_dict(), found, asked.as_json)
        return
    if asked.verify:
        check_comparable(*where)
    with ExitStack() as stack:
        stack.enter_context(doing(f"folding {asked.surgery}"))
        # what is replaced stays until all is done; else a run that is broken off can go on
        out = (
            stack.enter_context(fresh(Path(asked.out), asked.inputs, True))
            if asked.force
            else asked.out
        )
        report = fold_checkpoint(
            *where,
            out,
            dtype=asked.dtype,
            resume=asked.resume,
            reversible=asked.reversible,
            allow_other_base=other,
            allow_unchanged=asked.allow_unchanged,
            part=asked.part,
            finish=asked.finish,
            requantise=again,
        )
        if asked.verify and report.part is None:
            report = replace(report, verified=checked_outputs(*where, out, other))
    report = replace(report, out=asked.out)
    print_result(report.to_dict(), report, asked.as_json)


def _in_memory(asked: Asked, *notes: str) -> None:
    """Fold the model itself."""
    from peftsurgery.formats.pretrained import fold_to_directory

    inputs, onnx, out = asked.inputs, asked.onnx, Path(asked.out)
    inside = None if onnx is None else _inside(onnx, out)
    if onnx is not None and inside is None:
        check_free(onnx, inputs, asked.force)
    with fresh(out, inputs, asked.force) as part, doing(f"folding {asked.surgery}"):
        result = fold_to_directory(
            asked.surgery,
            part,
            base=asked.base,
            onnx=onnx if inside is None else part / inside,
            verify=asked.verify,
            adapters=asked.name,
            requantise=asked.requantise,
            allow_other_base=asked.allow_other_base,
            kind=asked.kind,
        )
    result = replace(result, notes=(*result.notes, *notes))
    if result.onnx is not None:
        result = replace(result, onnx=result.onnx.moved(str(onnx)))
    result = replace(result, out=out)
    print_result(result.to_dict(), result, asked.as_json)


def _inside(file: Path, out: Path) -> Path | None:
    """The name beneath OUT of an ONNX file that is asked for inside it; None for one elsewhere.

    It is written where OUT is being made. `OUT/../elsewhere` is elsewhere.
    """
    real, whole = Path(os.path.realpath(file)), Path(os.path.realpath(out))
    return real.relative_to(whole) if real.is_relative_to(whole) else None
