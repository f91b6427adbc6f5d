"""A fold in parts: processes that share a directory write what one would, in whatever order."""

import random
import signal
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path

import pytest

from peftsurgery.checkpoint.certificate import verify
from peftsurgery.checkpoint.fold_report import FoldReport
from peftsurgery.checkpoint.part_folder import FoldPart
from peftsurgery.checkpoint.plan import Planned
from peftsurgery.checkpoint.streaming import fold_files
from peftsurgery.errors import SurgeryError
from peftsurgery.tensor_file import read_header
from tests.checkpoint import streamed

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 5


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Given:
    """A base and an adapter, and what one process makes of them."""

    def __init__(self, folder: Path, rows: int = 64) -> None:
        self.folder, self.out = folder, folder / "out"
        self.base, self.adapter = streamed.made_at(folder, SHARDS, rows)
        self.plan = Planned(streamed.plan_of(SHARDS), self.base, read_header(self.adapter))
        fold_files(self.plan, folder / "whole", reversible=True)

    def part(self, text: str, reversible: bool = True) -> FoldReport:
        return fold_files(self.plan, self.out, reversible=reversible, part=FoldPart.parse(text))

    def finish(self) -> FoldReport:
        return fold_files(self.plan, self.out, reversible=True, finish=True)

    def started(self, part: str) -> subprocess.Popen[bytes]:
        """A process that writes a part, begun."""
        command = [sys.executable, "-m", "tests.checkpoint.streamed"]
        paths = [str(path) for path in (self.base, self.adapter, self.out)]
        process = subprocess.Popen([*command, *paths, part], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        return process

    def is_as_one_run(self) -> bool:
        left = sorted(path.name for path in self.folder.iterdir() if "out" in path.name)
        assert left == ["out"]
        assert verify(self.out).changed == SHARDS
        return content(self.out) == content(self.folder / "whole")


@pytest.fixture
def given(tmp_path: Path) -> Given:
    return Given(tmp_path)


@pytest.mark.parametrize("order", permutations((1, 2, 3)))
def test_in_any_order_the_last_part_finishes(given: Given, order: tuple[int, ...]) -> None:
    for number in order[:-1]:
        report = given.part(f"{number}/3")
        assert report.part == f"{number}/3"
        assert not given.out.exists()
    last = given.part(f"{order[-1]}/3")
    assert last.part is None
    assert (len(last.changed), last.tensors) == (SHARDS, 2 * SHARDS)
    assert given.is_as_one_run()


def test_more_parts_than_files_do_no_harm(given: Given) -> None:
    for number in range(7, 0, -1):
        given.part(f"{number}/7")
    assert given.is_as_one_run()


def test_parts_that_run_at_once_make_one_directory(tmp_path: Path) -> None:
    given = Given(tmp_path, rows=1024)
    processes = [given.started(f"{number}/3") for number in (1, 2, 3)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert given.is_as_one_run()


def test_a_part_that_was_killed_is_run_again_beside_the_others(tmp_path: Path) -> None:
    given, draw = Given(tmp_path, rows=2048), random.Random(0)
    for _ in range(4):
        process = given.started("2/2")
        time.sleep(draw.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    other = given.started("1/2")
    again = given.part("2/2")
    other.communicate()
    assert other.returncode == 0
    assert again.part in (None, "2/2")
    assert given.is_as_one_run()


def test_a_part_that_was_damaged_since_is_written_again(given: Given) -> None:
    given.part("1/2")
    shard = given.folder / "out.part" / "model-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    report = given.part("1/2")
    assert report.resumed == ("model-00000.safetensors", "model-00004.safetensors")
    given.part("2/2")
    assert given.is_as_one_run()


def test_what_is_missing_is_not_finished(given: Given) -> None:
    with pytest.raises(SurgeryError, match=r"PSG610.*not all parts"):
        given.finish()
    given.part("1/3")
    given.part("3/3")
    with pytest.raises(SurgeryError, match=r"PSG610.*not all parts of .* are written: 2"):
        given.finish()
    assert not given.out.exists()
    given.part("2/3")
    assert given.is_as_one_run()


def test_a_last_part_that_died_before_the_end_is_finished_by_hand(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    given.part("1/2")
    with monkeypatch.context() as patched:
        patched.setattr(
            "peftsurgery.checkpoint.streaming.all_parts", lambda *_: pytest.fail("killed here")
        )
        with pytest.raises(pytest.fail.Exception):
            given.part("2/2")
    assert not given.out.exists()
    assert given.finish().part is None
    assert given.is_as_one_run()


def test_another_number_of_parts_is_refused_and_spoils_nothing(given: Given) -> None:
    given.part("1/2")
    for other in ("1/3", "1/1"):
        with pytest.raises(SurgeryError, match=r"PSG610.*begun in 2 parts"):
            given.part(other)
    with pytest.raises(SurgeryError, match=r"PSG610.*begun in 2 parts"):
        fold_files(given.plan, given.out, resume=True, reversible=True)
    with pytest.raises(SurgeryError, match=r"PSG610.*begun for another"):
        given.part("2/2", reversible=False)
    given.part("2/2")
    assert given.is_as_one_run()


@pytest.mark.parametrize("text", ["", "2", "0/3", "4/3", "1/0", "-1/2", "1/2/3", "a/b", "1/²"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(SurgeryError, match="PSG904"):
        FoldPart.parse(text)
