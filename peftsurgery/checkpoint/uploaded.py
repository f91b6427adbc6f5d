"""A directory that is made elsewhere: each file is made here, uploaded when it is whole, dropped.

A journal goes with it, as with one that is made here (:mod:`.part_folder`), so that any machine can
go on; what it says of a file is believed once the file, read again, has the hashes that it says.
The certificate is the last to arrive, and then the journal is removed: a directory that has a
journal, or no certificate, is not done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftsurgery.checkpoint.part_file import PartFile
from peftsurgery.checkpoint.part_folder import JOURNAL, PartFolder, part_folder
from peftsurgery.errors import SurgeryError
from peftsurgery.remote import Elsewhere, is_shard
from peftsurgery.stand_ins import FolderStandIn, standing_in


@dataclass(frozen=True)
class UploadingFolder(PartFolder):
    """A directory in the making whose files are ``place``'s as soon as they are whole."""

    place: Elsewhere = field(kw_only=True)
    stand_in: FolderStandIn = field(kw_only=True)

    def ended(self, file: PartFile, said: Any = None) -> None:
        """Upload a file that is whole; of weights, only the header stays here."""
        super().ended(file, said)
        here = self.path / file.name
        self.place.put(here, file.name)
        if is_shard(file.name):
            self.stand_in.made_hollow(here)
            self.place.put(self.path / self.journal, JOURNAL)


def check_uploadable(place: Elsewhere, resume: bool) -> dict[str, int]:
    """The files of a directory that is to be made elsewhere, as far as it is there.

    PSG601 if something else is there, PSG610 for what an earlier run left, without ``resume``.
    """
    there = place.sizes()
    if there and JOURNAL not in there:
        raise SurgeryError("PSG601", f"'{place.url}' exists already", "choose another name")
    if there and not resume:
        message = f"'{place.url}' has a journal: a run that did not end"
        raise SurgeryError("PSG610", message, "go on with --resume, or remove it")
    return there


@contextmanager
def uploading_folder(place: Elsewhere, out: Path, plan: str, resume: bool) -> Iterator[PartFolder]:
    """Make a directory elsewhere, ``out`` being where its files are made.

    What it takes and raises is as with :func:`part_folder`, but for PSG611 instead of PSG603. An
    error that trying again would not mend removes what was uploaded.
    """
    path, there = out.with_name(f"{out.name}.part"), check_uploadable(place, resume)
    stand_in = FolderStandIn(place.url, place.read)
    if there:
        path.mkdir()
        place.fetch(JOURNAL, path)
        stand_in = place.hollowed(there, path)
    with standing_in(path, stand_in), part_folder(out, plan, bool(there)) as begun:
        into = UploadingFolder(
            begun.path, begun.done, begun.journal, place=place, stand_in=stand_in
        )
        try:
            place.put(path / JOURNAL, JOURNAL)
            yield into
            place.remove(JOURNAL)
        except OSError as error:
            count = sum(name in stand_in.hollow for name in into.done)
            message = f"'{place.url}' cannot be written: {error.strerror or error}"
            hint = f"{count} files of weights are there; go on with --resume"
            raise SurgeryError("PSG611", message, hint) from error
        except SurgeryError:
            for name in (*into.done, JOURNAL):
                place.remove(name)
            raise
