"""Where a fold reads and writes: directories, some of which stand for ones elsewhere (URLs)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from peftsurgery.checkpoint.part_folder import Making, part_folder
from peftsurgery.errors import SurgeryError
from peftsurgery.model_files import are_here
from peftsurgery.places import named_in
from peftsurgery.stand_ins import FolderStandIn, called, standing_in, with_urls

LOCAL = ("file", "local")  # protocols of this machine's own files


@dataclass(frozen=True)
class FoldPlaces:
    """The directories of a fold, and how that of the result is made."""

    adapter: Path
    base: str | None
    out: Path
    made_in: Making = part_folder

    @property
    def is_spooled(self) -> bool:
        """Whether the result goes elsewhere."""
        return self.made_in is not part_folder

    @property
    def called(self) -> str | Path:
        """What the result is called."""
        return called(self.out) if self.is_spooled else self.out


def is_url(name: str | Path | None) -> bool:
    """Whether a name is a URL of another place, and not a path or a hub id."""
    return isinstance(name, str) and "://" in name and name.partition(":")[0] not in LOCAL


def base_of(adapter: str | Path, base: str | Path | None) -> str | Path | None:
    """The base that is asked for, or that an adapter's directory names."""
    return base if base is not None else next(iter(named_in(Path(adapter))), None)


def has_files(adapter: str | Path, base: str | Path | None) -> bool:
    """Whether the base of an adapter is a directory whose weights are safetensors files.

    One elsewhere is one or nothing. PSG207 for an index that is damaged.
    """
    named = base_of(adapter, base)
    if is_url(adapter) or is_url(named):
        return True
    return named is not None and os.path.isdir(named) and are_here(Path(named))


@contextmanager
def placed(
    adapter: str | Path, base: str | Path | None, out: str | Path, resume: bool = False
) -> Iterator[FoldPlaces]:
    """Let a fold work on directories here: URLs are stood in for by what a spool here holds.

    Adapters are copied; of a base, its files but for the weights. PSG601, PSG602 and PSG610 for an
    ``out`` elsewhere that must not be written, PSG611 for what does not answer.
    """
    adapter, out = _without_scheme(adapter), _without_scheme(out)
    base = None if base is None else _without_scheme(base)
    if not any(is_url(each) for each in (adapter, out, base_of(adapter, base))):
        yield FoldPlaces(Path(adapter), None if base is None else str(base), Path(out))
        return
    from tempfile import TemporaryDirectory  # not needed where all is here

    with TemporaryDirectory(prefix="peftsurgery-") as spool, ExitStack() as stack:
        try:
            yield _elsewhere(Path(spool).resolve(), stack, adapter, base, out, resume)
        except SurgeryError as error:
            hint = None if error.hint is None else with_urls(error.hint)
            raise SurgeryError(error.code, with_urls(error.message), hint, error.where) from error
        except OSError as error:
            hint = "see that the place answers, and run it again"
            message = with_urls(str(error.strerror or error))
            raise SurgeryError("PSG611", message, hint) from error


def _elsewhere(
    spool: Path,
    stack: ExitStack,
    adapter: str | Path,
    base: str | Path | None,
    out: str | Path,
    resume: bool,
) -> FoldPlaces:
    """The places of a fold of which some are elsewhere."""
    from peftsurgery.checkpoint.uploaded import check_uploadable, uploading_folder
    from peftsurgery.remote import Elsewhere, fetch_adapter, fetch_model

    def check_apart(url: str) -> Elsewhere:
        place = Elsewhere.of(url)
        if target is not None and target.touches(place):
            message = f"the output '{out}' is, holds or lies in the input '{url}'"
            raise SurgeryError("PSG602", message, "write somewhere else")
        return place

    def stand_in(url: str, name: str, fetch: Callable[[Elsewhere, Path], FolderStandIn]) -> Path:
        place, folder = check_apart(url), spool / name
        folder.mkdir()
        stack.enter_context(standing_in(folder, fetch(place, folder)))
        return folder

    target = Elsewhere.of(str(out)) if is_url(out) else None
    if is_url(adapter):
        adapter = stand_in(str(adapter), "adapter", fetch_adapter)
    for each in named_in(Path(adapter)):
        if target is not None and each.startswith(target.url.partition("//")[0]):
            check_apart(each)
    base = base_of(adapter, base)
    if is_url(base):
        base = stand_in(str(base), "base", fetch_model)
    named = None if base is None else str(base)
    if target is None:
        return FoldPlaces(Path(adapter), named, Path(out))
    check_uploadable(target, resume)
    here = spool / "out"
    stack.enter_context(standing_in(here, FolderStandIn(target.url, target.read)))
    return FoldPlaces(Path(adapter), named, here, partial(uploading_folder, target))


def _without_scheme(name: str | Path) -> str | Path:
    """The path that a URL of this machine's own files is."""
    scheme, slashes, path = str(name).partition("://")
    return path if slashes and scheme in LOCAL else name
