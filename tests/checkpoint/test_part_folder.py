"""Directories in the making: whole or resumable, whatever ends the run."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peftsurgery.checkpoint.part_folder import part_folder
from peftsurgery.errors import SurgeryError

KILLED = """
import os, signal, sys
from pathlib import Path
from peftsurgery.checkpoint.part_folder import part_folder
with part_folder(Path(sys.argv[1]), "plan", resume=True) as into:
    into.write("a", [b"one", b"two"], {"n": 1})
    def blocks():
        yield b"half"
        os.kill(os.getpid(), signal.SIGKILL)
    into.write("b", blocks())
"""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_two(out: Path, refused: SurgeryError | None = None) -> None:
    with part_folder(out, "plan", resume=False) as into:
        into.write("a", [b"a"])
        if refused is not None:
            raise refused
        into.write("b", [b"b"])


def test_what_is_written_has_its_name_only_when_all_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with part_folder(out, "plan", resume=False) as into:
        into.write("a", [b"one", b"two"], {"n": 1})
        assert not out.exists()
        assert (into.path / "a").read_bytes() == b"onetwo"
    assert [path.name for path in out.iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_run_is_taken_up_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(SurgeryError, match="PSG610"), part_folder(out, "plan", resume=False):
        pass
    with pytest.raises(SurgeryError, match="begun for another"), part_folder(out, "other", True):
        pass
    with part_folder(out, "plan", resume=True) as into:
        assert into.done == {"a": {"n": 1}}
        assert not (into.path / "b").exists()
        into.write("b", [b"whole"])
    assert content(out) == {"a": b"onetwo", "b": b"whole"}


def test_a_journal_whose_last_line_was_cut_off_is_believed_up_to_there(tmp_path: Path) -> None:
    part = tmp_path / "out.part"
    part.mkdir()
    lines = [json.dumps({"plan": "plan"}), json.dumps({"file": "a", "said": 1}), '{"file": "b']
    (part / ".journal").write_text("\n".join(lines))
    (part / "a").write_bytes(b"a")
    with part_folder(tmp_path / "out", "plan", resume=True) as into:
        assert into.done == {"a": 1}
        into.write("b", [b"b"], 2)
        noted = [json.loads(line) for line in (part / ".journal").read_text().splitlines()]
        assert [line.get("file") for line in noted] == [None, "a", "b"]


@pytest.mark.parametrize("moment", range(1, 4))
def test_a_full_disk_is_a_coded_error_and_leaves_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    real, calls = os.fsync, list[int]()

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == moment:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SurgeryError, match="No space left") as refused:
        write_two(tmp_path / "out")
    assert refused.value.code == "PSG603"
    assert "--resume" in str(refused.value.hint)
    monkeypatch.setattr(os, "fsync", real)
    with part_folder(tmp_path / "out", "plan", resume=True) as into:
        for name in {"a", "b"} - into.done.keys():
            into.write(name, [name.encode()])
    assert content(tmp_path / "out") == {"a": b"a", "b": b"b"}


def test_two_runs_do_not_write_at_once(tmp_path: Path) -> None:
    with (tmp_path / ".out.part.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(SurgeryError, match="another process"):
            write_two(tmp_path / "out")
    assert not (tmp_path / "out.part").exists()


def test_what_could_not_be_computed_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="PSG402"):
        write_two(tmp_path / "out", SurgeryError("PSG402", "too large"))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_someone_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "thesis.txt").write_text("mine")
    refused = pytest.raises(SurgeryError, match="it is not ours")
    with refused, part_folder(tmp_path / "out", "plan", resume=True):
        pass
    assert (tmp_path / "out.part" / "thesis.txt").read_text() == "mine"
