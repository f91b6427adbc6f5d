"""Directories elsewhere, by URLs of fsspec (``s3://``, ``gs://``, ``hf://``...), with patience.

A request that fails is made again a few times, later each time; one that is refused is not. What a
protocol takes to log in, its library finds as ever: in the environment or its configuration.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from inspect import signature
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from peftsurgery.errors import SurgeryError, did_you_mean, first_line
from peftsurgery.files import MAX_JSON
from peftsurgery.model_files import INDEX, is_weights, pipeline_parts
from peftsurgery.stand_ins import FolderStandIn, Range
from peftsurgery.tensor_file import MAX_HEADER

PAUSES = [0.2, 0.8, 3.2, 10.0]  # seconds before a request is made again
PART, PARTS = 5 * 2**20, 9000  # bytes that are sent at once (S3's least), and how often: 10,000
AT_ONCE = 16  # requests for the parts of a file
LASTING = (FileNotFoundError, PermissionError, NotImplementedError, IsADirectoryError)
EXTRA = "pip install 'peftsurgery[remote]' has s3fs; other protocols have packages of their own"

Result = TypeVar("Result")


class UnansweredError(OSError):
    """A request that was refused, or failed as often as it was made."""


@dataclass(frozen=True)
class Elsewhere:
    """A directory elsewhere: its URL, the file system of fsspec, and its path there."""

    url: str
    fs: Any
    path: str

    @staticmethod
    def of(url: str) -> Elsewhere:
        """The directory that a URL names.

        PSG902 without the packages of its protocol, PSG904 for one that is none or has a password.
        """
        protocol, _, rest = url.partition("://")
        if "::" in url or ":" in rest.partition("/")[0].rpartition("@")[0]:
            message = f"'{protocol}://...' is chained, or has a password in it"
            raise SurgeryError("PSG904", message, "log in by the environment")
        try:
            from fsspec import available_protocols, get_filesystem_class
            from fsspec.core import url_to_fs

            get_filesystem_class(protocol)
        except ImportError as error:
            raise SurgeryError("PSG902", f"'{url}': {first_line(error)}", EXTRA) from None
        except ValueError:
            near = did_you_mean(protocol, available_protocols())
            raise SurgeryError("PSG904", f"there is no protocol '{protocol}'", near) from None
        try:
            fs, path = url_to_fs(url)
        except Exception as error:  # it may log in: each library has its own errors for that
            raise UnansweredError(f"'{url}': {first_line(error)}") from error
        return Elsewhere(url.rstrip("/"), fs, path.rstrip("/"))

    def touches(self, other: Elsewhere) -> bool:
        """Whether one of two directories is, holds or lies in the other."""
        here, there = PurePosixPath(self.path), PurePosixPath(other.path)
        is_near = here.is_relative_to(there) or there.is_relative_to(here)
        return type(self.fs) is type(other.fs) and is_near

    def sizes(self) -> dict[str, int]:
        """The bytes of every file in it, by its path beneath; PSG207 for one that points out."""

        def listed() -> dict[str, Any]:
            self.fs.invalidate_cache()
            found: dict[str, Any] = self.fs.find(self.path, detail=True)
            return found

        try:
            found = self._tried(listed, self.url)
        except UnansweredError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            return {}
        paths = {path[len(self.path) :].lstrip("/"): each for path, each in found.items()}
        sizes = {name: int(each["size"] or 0) for name, each in paths.items()}
        for name in sizes:
            if "\0" in name or "\\" in name or {"..", "."} & {*name.split("/")}:
                raise SurgeryError("PSG207", f"'{self.url}' holds '{name}', which points out of it")
        return {name: size for name, size in sizes.items() if name and not name.endswith("/")}

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """Bytes of files, for each range; those that come are not asked for again."""
        found = {each: b"" for each in ranges if each[1] == each[2]}

        def ask() -> None:
            left = [each for each in dict.fromkeys(ranges) if each not in found]
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for each, answer in zip(left, pool.map(self._part, left), strict=True):
                    found[each] = answer

        self._tried(ask, f"{self.url}/{ranges[0][0]}" if ranges else self.url)
        return [found[each] for each in ranges]

    def fetch(self, name: str, into: Path) -> None:
        """Copy a file whole to a directory here."""
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self._tried(lambda: self.fs.get_file(self._at(name), str(target)), f"{self.url}/{name}")

    def put(self, file: Path, name: str) -> None:
        """Copy a file from here, and see that all of it has arrived."""
        size = file.stat().st_size
        takes = signature(self.fs.put_file).parameters
        cut = {"chunksize": PART * (1 + size // (PART * PARTS)), "max_concurrency": 2}
        told = {option: value for option, value in cut.items() if option in takes}

        def sent() -> None:
            self.fs.put_file(str(file), self._at(name), **told)
            self.fs.invalidate_cache()
            if self.fs.info(self._at(name))["size"] != size:
                raise EOFError("not all of it has arrived")

        self._tried(sent, f"{self.url}/{name}")

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

        def gone() -> None:
            if self.fs.exists(self._at(name)):
                self.fs.rm_file(self._at(name))

        self._tried(gone, f"{self.url}/{name}")

    def hollowed(self, files: Mapping[str, int], into: Path) -> FolderStandIn:
        """Let what is weights among files stand in a directory here, with headers alone."""
        sizes = {name: size for name, size in files.items() if is_shard(name)}
        stand_in = FolderStandIn(self.url, self.read, sizes)
        firsts = self.read([(name, 0, min(8, size)) for name, size in sizes.items()])
        ends = [
            min(size, 8 + min(int.from_bytes(first, "little"), MAX_HEADER))
            for first, size in zip(firsts, sizes.values(), strict=True)
        ]
        headers = self.read([(name, 0, end) for name, end in zip(sizes, ends, strict=True)])
        for (name, size), header in zip(sizes.items(), headers, strict=True):
            (into / name).write_bytes(header)
            with (into / name).open("r+b") as stream:
                stream.truncate(size)
        return stand_in

    def _part(self, part: Range) -> bytes:
        name, start, end = part
        answer: bytes = self.fs.cat_file(self._at(name), start=start, end=end)
        if len(answer) != end - start:
            raise EOFError("the answer is cut short")
        return answer

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}"

    def _tried(self, request: Callable[[], Result], what: str) -> Result:
        """Make a request until it is answered. UnansweredError if it is not."""
        for pause in (*PAUSES, None):
            try:
                return request()
            except Exception as error:  # each library has its own errors for a broken connection
                if pause is None or isinstance(error, LASTING):
                    times = "" if isinstance(error, LASTING) else f" ({1 + len(PAUSES)} times)"
                    told = f"'{what}': {type(error).__name__}: {first_line(error)}{times}"
                    raise UnansweredError(told) from error
                time.sleep(pause)
        raise AssertionError


def is_shard(name: str) -> bool:
    """Whether a file of a model's directory holds weights that are read or written by shards."""
    return name.endswith(".safetensors") and "/" not in name


def fetch_adapter(place: Elsewhere, into: Path) -> FolderStandIn:
    """Copy a directory of small files whole. PSG611 if there is nothing."""
    for name in _sizes(place):
        place.fetch(name, into)
    return FolderStandIn(place.url, place.read)


def fetch_model(place: Elsewhere, into: Path) -> FolderStandIn:
    """Copy a model's files but for its weights, which stay where they are. PSG611 for nothing."""
    sizes = _sizes(place)
    first = [name for name in (INDEX, "modules.json") if sizes.get(name, MAX_JSON + 1) <= MAX_JSON]
    for name in first:
        place.fetch(name, into)
    parts = pipeline_parts(into)
    for name in sizes:
        path = PurePosixPath(name)
        if name not in first and (not is_weights(Path(name)) or path.parts[0] in parts):
            place.fetch(name, into)
    return place.hollowed(sizes, into)


def _sizes(place: Elsewhere) -> dict[str, int]:
    """The files of a directory that is read, hidden ones left out. PSG611 if there are none."""
    sizes = {
        name: size
        for name, size in place.sizes().items()
        if not any(part.startswith(".") for part in name.split("/"))
    }
    if not sizes:
        raise SurgeryError("PSG611", f"there is nothing at '{place.url}'")
    return sizes
