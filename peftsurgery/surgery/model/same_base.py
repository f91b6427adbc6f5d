"""Whether a base is the one that an adapter was made for, by its weights.

Tensors of one name must be equal; those that the adapter itself holds values of are left out. A
name that only one side has does no harm if it is another name of a tensor that both have (a tie
that one of them stored), or if it is known to be no part of the model.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from peftsurgery.capture.fingerprint import (
    Weights,
    can_be_cast,
    in_memory,
    print_as,
    weights_of,
)
from peftsurgery.capture.sources import Source
from peftsurgery.checkpoint.record import FILE, folded_into
from peftsurgery.errors import SurgeryError
from peftsurgery.fingerprint import Fingerprint, TensorPrint, content_digest
from peftsurgery.places import everything_read
from peftsurgery.surgery.model.fold_record import base_folder
from peftsurgery.surgery.plan.origin import Origin

HINT = "--allow-other-base, allow_other_base=True in Python, takes it all the same"


@dataclass(frozen=True)
class Made:
    """What an adapter's files say of the base it was made for.

    ``base`` is the base's name; ``fingerprint`` is None where none was recorded, and ``records``
    whether files of this kind record one; ``replaced`` are the tensors of the base that the adapter
    has values of its own for; ``content`` is a hash of its tensors.
    """

    path: Path
    base: str | None
    content: str
    fingerprint: Fingerprint | None = None
    replaced: Collection[str] = ()
    records: bool = False


def compare_base(made: Made, source: Source) -> Origin:
    """Compare a base's weights with those an adapter was made for.

    Returns where the adapter came from, with the differences as reasons to refuse, and notes.
    """
    weights = weights_of(source)
    if made.fingerprint is None:
        why, notes = _folded_before(made, source), _unknown(made)
    elif weights is None:
        why, notes = [], ("the base's weights are not here, so they were not compared",)
    else:
        why, notes = _compare(made.fingerprint, weights, made.replaced)
        earlier = folded_into(base_folder(source)) if why else []
        why = [*_said_folded(earlier), *why]
    other = "; ".join(why) or None
    told = (f"'{made.path}' is on another base than it was made for: {other}",) if why else notes
    return Origin(made.path, made.content, None, other, told)


def check_base(origin: Origin, source: Source, allow_other_base: bool) -> None:
    """Refuse a base that was found to be another one, unless that is allowed. PSG319."""
    if origin.other_base and not allow_other_base:
        message = f"'{origin.folder}' was made for another base than '{_name(source)}': "
        raise SurgeryError("PSG319", message + origin.other_base, _hint(source))


def check_adapter_base(
    folder: Path, base: Any, tensors: Mapping[str, Tensor], source: Source, allow_other_base: bool
) -> Origin:
    """The same for an adapter of a kind that has no fingerprint; ``base`` is what it names.

    A base that something was folded into is another one, unless the adapter names it. PSG319.
    """
    named = base if isinstance(base, str) else None
    content = content_digest(map(in_memory, tensors.values()))
    origin = compare_base(Made(folder, named, content), source)
    check_base(origin, source, allow_other_base)
    return origin


def _unknown(made: Made) -> tuple[str, ...]:
    told = f"'{made.path}' has no fingerprint of its base, so the base's weights were not compared"
    return (told,) if made.records else ()


def _name(source: Source) -> str:
    return source.origin or type(source.module).__name__


def _hint(source: Source) -> str:
    if source.origin is not None and source.folder is None and not source.on_meta:
        return f"a factory must make the same weights at every call; {HINT}"
    return HINT


def _folded_before(made: Made, source: Source) -> list[str]:
    """Why a base that something was folded into is not the one an adapter was made for.

    It may be, if the adapter names it and is not itself in it.
    """
    home = base_folder(source)
    earlier = folded_into(home)
    again = [entry for entry in earlier if entry.get("content") == made.content]
    named = filter(os.path.exists, everything_read([made.base])[:1])
    its_own = home is not None and any(os.path.samefile(place, home) for place in named)
    return _said_folded(again if its_own else earlier)


def _said_folded(entries: Collection[dict[str, object]]) -> list[str]:
    if not entries:
        return []
    names = ", ".join(f"'{entry.get('adapter')}'" for entry in entries)
    return [f"its {FILE} says that {names} was folded into it"]


def _compare(
    recorded: Fingerprint, here: Weights, replaced: Collection[str]
) -> tuple[list[str], tuple[str, ...]]:
    """The differences, as reasons to refuse, and what else is to be said."""
    wanted = {n: p for n, p in recorded.tensors.items() if n not in replaced}
    common = [name for name in wanted if name in here.tensors]
    if wanted and not common:
        return [f"it has no tensor of a recorded name, '{min(wanted)}' for one"], ()
    reasons = [
        *_unequal(wanted, here, common),
        *_one_sided(wanted, recorded.live, here, common, replaced),
    ]
    cast = sorted({wanted[n].dtype for n in common if wanted[n].dtype != here.tensors[n].dtype})
    note = f"the base was recorded in {', '.join(cast)}, and compared after a cast to that"
    return reasons, (note,) if cast and not reasons else ()


def _unequal(
    wanted: dict[str, TensorPrint], here: Weights, common: Collection[str]
) -> Iterator[str]:
    """What is said of tensors that differ, each kind of difference once."""
    values, shapes, dtypes = [], [], []
    for name in common:
        old, new = wanted[name], here.tensors[name]
        if old.shape != new.shape:
            shapes.append(f"'{name}' is {list(new.shape)} and was {list(old.shape)}")
        elif old.dtype != new.dtype and not can_be_cast(new, old.dtype):
            dtypes.append(f"'{name}' is in {new.dtype} and was recorded in {old.dtype}")
        elif print_as(new, old.dtype) != old:
            values.append(name)
    yield from shapes[:1]
    if values:
        yield f"{len(values)} of {len(common)} tensors have other values, '{values[0]}' first"
    if dtypes:
        yield f"{len(dtypes)} tensors cannot be compared: {dtypes[0]}"


def _one_sided(
    wanted: dict[str, TensorPrint],
    was_live: bool,
    here: Weights,
    common: Collection[str],
    replaced: Collection[str],
) -> Iterator[str]:
    """What is said of tensors that the recorded base had and this one has not, or vice versa.

    A live module's tensors are all it has, so what else a file holds is not the model's.
    """
    known = {wanted[name] for name in common}
    lost = [n for n in wanted if n not in here.tensors and wanted[n] not in known]
    if lost and not here.live:
        yield f"it has no '{lost[0]}'"
    new = [n for n in here.tensors if n not in wanted and n not in replaced]
    new = [n for n in new if here.live and not was_live and here.tensors[n].print() not in known]
    if new:
        yield f"it has '{new[0]}' besides, for which there were no values"
