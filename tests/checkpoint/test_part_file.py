"""Files in the making: on the disk before they are whole, and no failed write is forgotten."""

import errno
import os
from io import FileIO
from pathlib import Path
from threading import Event, Thread

import pytest

from peftsurgery.checkpoint import part_file
from peftsurgery.checkpoint.part_file import PartFile
from peftsurgery.checkpoint.part_folder import PartFolder


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PartFile:
    """A file that is to be flushed after every four bytes."""
    monkeypatch.setattr(part_file, "FLUSHED", 4)
    return PartFile("weights", FileIO(tmp_path / "weights", "w+"))


def test_the_disk_has_what_was_written_while_more_is_written(
    file: PartFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, go_on, real = list[tuple[int, bytes]](), Event(), os.fdatasync

    def watched(handle: int) -> None:
        there = Path(f"/proc/self/fd/{handle}").read_bytes()
        flushed.append((handle, there))
        assert go_on.wait(30)
        real(handle)

    monkeypatch.setattr(os, "fdatasync", watched)
    file.write(b"0123", 0)
    file.write(b"4567", 4)  # while the first four are on their way
    go_on.set()
    while file._flush is not None and file._flush.is_alive():
        file._flush.join(30)
    file.write(b"89ab", 8)
    assert file._flush is not None
    file._flush.join(30)
    file.close()
    assert [there[:4] for _, there in flushed] == [b"0123"] * 2
    assert flushed[1][1] == b"0123456789ab"
    assert Path(str(file.stream.name)).read_bytes() == b"0123456789ab"


def test_what_a_flush_was_told_of_is_still_told_at_the_end(
    file: PartFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = list[int]()

    def refused(handle: int) -> None:
        opened.append(handle)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", refused)
    file.write(b"0123", 0)
    assert file._flush is not None
    file._flush.join(30)
    assert opened
    assert opened[0] != file.stream.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])  # closed again
    monkeypatch.setattr(os, "fsync", refused)  # the system tells each that has opened the file
    with pytest.raises(OSError, match="Input/output"):
        file.close()
    assert opened[1] == file.stream.fileno()


def test_where_no_thread_can_be_the_file_is_written_all_the_same(
    file: PartFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", refused)
    before = os.listdir("/proc/self/fd")
    file.write(b"0123", 0)
    file.write(b"4567", 4)
    assert os.listdir("/proc/self/fd") == before
    file.close()
    assert Path(str(file.stream.name)).read_bytes() == b"01234567"


def test_a_file_that_is_adopted_is_the_one_that_was_opened_before_it_was_written(
    tmp_path: Path,
) -> None:
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    nameless = PartFile("weights", FileIO(os.open(tmp_path, flags, 0o666), "r+"))
    nameless.write(b"0123", 0)
    into = PartFolder(tmp_path, {})
    adopted = into.adopted(nameless)
    nameless.stream.seek(3)
    assert adopted.stream.tell() == 3  # one opening of the file, so one memory of its errors
    nameless.stream.close()
    into.ended(adopted)
    assert (tmp_path / "weights").read_bytes() == b"0123"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".journal", "weights"]
