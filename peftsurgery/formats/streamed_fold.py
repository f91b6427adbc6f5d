"""Folds of checkpoints: an adapter's directory made into a plan, which is carried out on files.

The plan says which weight a site reads, which rows of it, and how it lies in memory. Most adapters
of peft's say that by the names of their tensors, and saved surgeries in their manifests; for others
the base is captured, without weights, in a process of its own unless torch is here already.
Carrying it out needs the weights and no graph; see :mod:`peftsurgery.checkpoint`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsurgery.arguments import checked
from peftsurgery.checkpoint.codecs.coded import CONFIG, QUANTISER
from peftsurgery.checkpoint.fold_report import FoldReport
from peftsurgery.checkpoint.part_folder import FoldPart
from peftsurgery.checkpoint.plan import Planned
from peftsurgery.checkpoint.streaming import fold_files
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.formats.peft.named_plan import named_plan
from peftsurgery.formats.placed import FoldPlaces, base_of, is_url, placed
from peftsurgery.formats.saved_plan import saved_plan
from peftsurgery.outputs import check_free
from peftsurgery.places import object_in
from peftsurgery.quiet import quiet
from peftsurgery.stand_ins import called

if TYPE_CHECKING:
    from peftsurgery.checkpoint.estimate import FoldEstimate

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@checked
def fold_checkpoint(
    adapter: str | Path,
    base: str | Path | None,
    out: str | Path,
    dtype: str | None = None,
    resume: bool = False,
    reversible: bool = False,
    allow_other_base: bool = False,
    progress: Callable[[int], None] | None = None,
    allow_unchanged: bool = False,
    part: str | None = None,
    finish: bool = False,
    requantise: bool = False,
) -> FoldReport:
    """Fold an adapter's directory into the files of its base, without building the model.

    ``adapter`` is a saved surgery or a peft adapter, ``base`` the directory of its base if not the
    one that it names, ``out`` what is written; a run that was broken off goes on with ``resume``.
    Changes are added in fp32 a few rows at a time and rounded once, to the base's dtype or to
    ``dtype`` ("float32", "bfloat16", "float16"); all other bytes are copied. With ``reversible``,
    residuals beside the weights let :func:`unfold_checkpoint` restore the base without the base.
    What changes of a quantised base is written plain and so is the rest; with ``requantise`` it is
    quantised again, and the rest is copied.
    ``progress`` is told the bytes that are written. ``peftsurgery.json`` in ``out`` is the
    certificate that :func:`verify` checks. Several processes that share a file system each write a
    ``part``, "2/3" every third file from the second on; who comes last finishes ``out``, or whoever
    calls with ``finish``.

    Each place may be a URL that fsspec knows (``s3://``...): weights are read by ranges, and each
    file that is written is uploaded from a spool in the directory for temporary files. Then there
    are no parts and no residuals.

    Raises what :func:`fold` raises of rules that cannot be folded, PSG319 for another base, PSG415
    if nothing would change (``allow_unchanged`` writes it anyway), PSG416 for what cannot be folded
    on files, PSG601 and PSG602 for a place that is taken or read, PSG610 for what an earlier run
    left, PSG611 for a URL that does not answer, PSG902 and PSG904 for one that is not understood.
    """
    mine = None if part is None else FoldPart.parse(part)
    code = _checked(dtype, reversible, requantise)
    _check_whole(adapter, base, out, {"part": part, "finish": finish, "reversible": reversible})
    with placed(adapter, base, out, resume) as places:
        with _planned(places, allow_other_base) as planned:
            asked = code, resume, reversible, progress, allow_unchanged, mine, finish, requantise
            report = fold_files(planned, places.out, *asked, places.made_in)
        return replace(report, out=places.called)


def estimate_fold(
    adapter: str | Path,
    base: str | Path | None,
    out: str | Path,
    dtype: str | None = None,
    reversible: bool = False,
    allow_other_base: bool = False,
    requantise: bool = False,
) -> FoldEstimate:
    """Tell what :func:`fold_checkpoint` would take: bytes, memory, disk. Nothing is written.

    The arguments are those of the fold, and so are the errors of places and plans.
    """
    from peftsurgery.checkpoint.estimate import estimate  # which a fold itself does not need

    code = _checked(dtype, reversible, requantise)
    _check_whole(adapter, base, out, {"reversible": reversible})
    with (
        placed(adapter, base, out) as places,
        _planned(places, allow_other_base, recorded=False) as planned,
    ):
        spooled = places.is_spooled
        return estimate(planned, places.out, code, reversible, requantise, spooled)


def check_comparable(adapter: str | Path, base: str | Path | None) -> None:
    """Refuse, before anything is written, a base that no model in memory can be made of. PSG215."""
    named = base_of(adapter, base)
    if named is not None and object_in(Path(named) / CONFIG).get(QUANTISER):
        message = f"'{named}' is quantised, and there is no model in memory to compare with"
        hint = "leave out --verify; `peftsurgery verify OUT` checks that what is there was written"
        raise SurgeryError("PSG215", message, hint)


def checked_outputs(
    adapter: str | Path, base: str | Path | None, out: str | Path, allow_other_base: bool = False
) -> float:
    """Compare a folded directory, as transformers loads it, with the operated model.

    The models must fit in memory. Returns the largest difference of outputs at two shapes; ``out``
    is removed where that is too large: PSG410.
    """
    from peftsurgery.formats.pretrained import check_written, open_adapter
    from peftsurgery.formats.trial_inputs import unseen_inputs

    named = None if base is None else str(base)
    try:
        with quiet():
            operated = open_adapter(Path(adapter), named, allow_other_base)
            cases = unseen_inputs(operated)
            return check_written(operated, operated.source.module, Path(out), cases)
    except SurgeryError:
        shutil.rmtree(out)
        raise


def _checked(dtype: str | None, reversible: bool, requantise: bool) -> str | None:
    """The dtype's name in files. PSG904."""
    if dtype is not None and dtype not in DTYPES:
        raise SurgeryError("PSG904", f"there is no dtype '{dtype}'", did_you_mean(dtype, DTYPES))
    if dtype is not None and reversible:
        message = "residuals are of the base's dtype, and another one is to be written"
        raise SurgeryError("PSG904", message, "give either dtype= or reversible=")
    if dtype is not None and requantise:
        message = "what is quantised again keeps its dtypes, and another one is to be written"
        raise SurgeryError("PSG904", message, "give either dtype= or requantise=")
    return None if dtype is None else DTYPES[dtype]


def _check_whole(
    adapter: str | Path, base: str | Path | None, out: str | Path, options: Mapping[str, Any]
) -> None:
    """Refuse what takes files of all of a fold here, where some are elsewhere. PSG904."""
    url = next((each for each in (out, adapter, base_of(adapter, base)) if is_url(each)), None)
    asked = next((name for name, value in options.items() if value), None)
    if url is not None and asked is not None:
        message = f"{asked}= works on files that are here, and '{url}' is elsewhere"
        raise SurgeryError("PSG904", message, f"leave out {asked}=, or fold a copy that is here")


@contextmanager
def _planned(
    places: FoldPlaces, allow_other_base: bool, recorded: bool = True
) -> Iterator[Planned]:
    """The plan of a fold, while it is carried out. PSG601 and PSG602 for where it is to write."""
    adapter, named = places.adapter, places.base
    check_free(places.out, [str(adapter), named] if named else [str(adapter)])
    with ExitStack() as stack:
        planned = named_plan(adapter, named, recorded) or saved_plan(adapter, named)
        if planned is None:
            planned = stack.enter_context(_captured(adapter, named, allow_other_base))
        check_free(places.out, [str(planned.base)])
        yield planned


@contextmanager
def _captured(adapter: Path, base: str | None, allow_other_base: bool) -> Iterator[Planned]:
    """The plan that a captured base gives; it is kept on the disk while it is carried out."""
    # most folds need none of these
    from tempfile import TemporaryDirectory

    from peftsurgery.formats.plan_process import planned_apart

    if base is not None and called(base) != base:
        message = f"'{adapter}' does not say by itself what it changes, or not of '{base}'"
        raise SurgeryError("PSG416", message, "fold a copy of the base that is here")
    with TemporaryDirectory() as room:
        if "torch" not in sys.modules:
            yield planned_apart(adapter, base, allow_other_base, Path(room))
        else:
            from peftsurgery.formats.captured_plan import captured_plan

            yield captured_plan(adapter, base, allow_other_base, Path(room))
