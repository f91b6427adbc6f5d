"""Where may be written: nowhere into, over or through what is read.

One function decides it for every command and for everything in Python that writes. Files and
directories are compared by what they are on the disk (device and inode), so that another spelling
of a path, a link of either kind or a mount changes nothing, and by their real paths where one of
the two does not exist yet.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from peftsurgery.errors import SurgeryError
from peftsurgery.files import read_object

Identity = tuple[int, int]

# What names the model that a directory was made for: a file, and the keys in it.
NAMING = {
    "surgery.json": ("base",),
    "adapter_config.json": ("base_model_name_or_path", "model_name"),
}


def check_apart(target: str | Path, read: Iterable[str | Path | None]) -> None:
    """Refuse to write ``target``, a file or a directory whole, if that touches what is ``read``.

    ``read`` are files, directories, hub ids (their place in the cache is meant) and other names,
    which are no places; what a saved surgery or an adapter among them was made for is read too.
    Raises PSG602 if ``target`` is one of them, holds one, lies in one, or shares a file with one by
    a hard link; PSG603 for a path that cannot be one.
    """
    try:
        place = _Target(Path(target))
        for given in everything_read(read):
            how = place.touches(given)
            if how:
                message = f"the output '{target}' {how} the input '{given}'"
                raise SurgeryError("PSG602", message, "write somewhere else")
    except ValueError as error:  # NUL in a path
        raise SurgeryError("PSG603", f"'{target}' cannot be written: {error}") from None


def give_usual_mode(file: Path) -> None:
    """Let others read a file as they may read any new one; safetensors writes for the owner."""
    mask = os.umask(0o077)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def everything_read(given: Iterable[str | Path | None]) -> list[Path]:
    """The files and directories that these names are, and those that they in turn name."""
    found: dict[Path, None] = {}
    waiting = [str(each) for each in given if each is not None and str(each)]
    while waiting:
        path = _place(waiting.pop(0))
        if path is not None and path not in found:
            found[path] = None
            waiting += named_in(path)
    return list(found)


def _place(name: str) -> Path | None:
    """The place that a name is: a path, or a hub id's directory in the cache; None for others."""
    if os.path.lexists(name):
        return Path(name)
    return hub_folder(name)


def hub_folder(name: str) -> Path | None:
    """The directory of the hub's cache that holds a model, if ``name`` is one that is there."""
    if name.count("/") > 1 or os.path.isabs(name) or ":" in name or "\\" in name:
        return None
    from huggingface_hub import constants  # slow to import, and every fold would
    from huggingface_hub.file_download import repo_folder_name

    try:
        inner = repo_folder_name(repo_id=name, repo_type="model")
    except ValueError:  # no id of the hub is written so
        return None
    folder = Path(constants.HF_HUB_CACHE, inner)
    return folder if os.path.isdir(folder) else None


def named_in(folder: Path) -> Iterator[str]:
    """The models that a saved surgery or an adapter says it was made for."""
    for file, keys in NAMING.items():
        content = object_in(folder / file)
        yield from (value for key in keys if isinstance(value := content.get(key), str) and value)


def object_in(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if it cannot be read, which whoever opens it will say."""
    try:
        return read_object(file, "PSG603")
    except SurgeryError:
        return {}


class _Target:
    """Something to be written, with all that it would replace and all that it would lie in."""

    def __init__(self, path: Path) -> None:
        self.paths = _spots(path)
        self.above = {p for spot in self.paths for p in spot.parents}
        self.own = {i for spot in self.paths for i in _identity(spot)}
        self.around = {i for spot in self.above for i in _identity(spot)}

    @cached_property
    def inside(self) -> set[Identity]:
        """What the target holds now, under whatever other names it has elsewhere."""
        entries = (entry for spot in self.paths for entry in _beneath(spot, through=False))
        found = [entry.stat(follow_symlinks=False) for entry in entries]
        return {(each.st_dev, each.st_ino) for each in found}

    def touches(self, given: Path) -> str | None:
        """How writing the target would touch what is read: 'is', 'holds' and so on, or None."""
        spots, own = _spots(given), set(_identity(given))
        if spots & self.paths or own & self.own:
            return "is"
        if self.paths & {p for spot in spots for p in spot.parents}:
            return "holds"
        if os.path.isdir(given) and (spots & self.above or own & self.around):
            return "lies in"
        if own & self.inside:
            return "holds"
        return self._touches_content(given)

    def _touches_content(self, folder: Path) -> str | None:
        """How writing the target would touch something inside a directory that is read."""
        for entry in _beneath(folder, through=True):
            identity = set(_identity(entry.path))
            if identity & self.own or identity & self.inside:
                return "is or shares a file of"
            if os.path.isdir(entry.path) and identity & self.around:
                return "lies in a directory of"
            if entry.is_symlink() and self.paths & set(_real(entry.path).parents):
                return "holds a file of"
        return None


def _spots(path: Path) -> set[Path]:
    """Where a path's name is, and where it leads if that is a link."""
    whole = path.absolute()
    named = {_real(whole.parent) / whole.name} if whole.name not in ("", "..") else set()
    return {_real(whole), *named}


def _beneath(folder: Path, through: bool) -> Iterator[os.DirEntry[str]]:
    """Everything in a directory, ``through`` its links or not; loops of links end."""
    seen = set(_identity(folder))
    waiting = [str(folder)] if os.path.isdir(folder) else []
    while waiting:
        for entry in _entries(waiting.pop()):
            yield entry
            if os.path.isdir(entry.path) if through else entry.is_dir(follow_symlinks=False):
                new = set(_identity(entry.path)) - seen
                seen |= new
                waiting += [entry.path] if new else []


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []  # what cannot be listed cannot be read either


def _identity(path: str | Path) -> list[Identity]:
    """What a path is on the disk, its link followed; nothing if there is nothing."""
    try:
        found = os.stat(path)
    except OSError:
        return []
    return [(found.st_dev, found.st_ino)]


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def is_hub_id(spec: str) -> bool:
    """Whether a text can name a model of the hub: owner/name, or the name alone of an old one."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", spec) is not None
