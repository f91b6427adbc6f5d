"""Copies that are made before a fold is planned: the same bytes with them, and no trace without."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peftsurgery.checkpoint.certificate import verify
from peftsurgery.checkpoint.copied_ahead import CopyAhead, copying_ahead, let_go
from peftsurgery.checkpoint.plan import Planned
from peftsurgery.checkpoint.streaming import fold_files
from peftsurgery.tensor_file import read_header
from tests.checkpoint import streamed

SHARDS = 3


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and the directory of an adapter whose tensors are named after what it changes."""
    base, file = streamed.made_at(tmp_path / "made", SHARDS, 700)
    named = {f"base_model.layers.{key[0]}.q.lora_{key[2]}": v for key, v in load_file(file).items()}
    (tmp_path / "adapter").mkdir()
    save_file(named, tmp_path / "adapter" / "adapter.safetensors")
    return base, tmp_path / "adapter"


def planned(base: Path) -> Planned:
    return Planned(streamed.plan_of(SHARDS), base, read_header(base.parent / "adapter.safetensors"))


def copied_all() -> None:
    """Wait until the process that copies has ended, having copied all that it would."""
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def nameless(folder: Path) -> list[str]:
    """The files of a directory that are open here and have no name."""
    links = [Path("/proc/self/fd", handle) for handle in os.listdir("/proc/self/fd")]
    found = [os.readlink(link) for link in links if link.is_symlink()]
    return [each for each in found if each.startswith(f"{folder}/") and each.endswith("(deleted)")]


def test_what_the_adapter_is_not_for_is_copied_and_hashed(
    tmp_path: Path, made: tuple[Path, Path]
) -> None:
    base, adapter = made
    ahead = CopyAhead(base, adapter, tmp_path)
    copied_all()
    found = ahead.taken()
    ahead.end()
    try:
        assert sorted(found) == sorted(path.name for path in base.glob("*.safetensors"))
        for number, copied in enumerate(found.values()):
            assert list(copied.hashes) == [f"layers.{number}.up.weight"]
    finally:
        let_go(found)


@pytest.mark.parametrize("wait", [True, False])
def test_a_fold_writes_the_same_with_copies_and_without(
    tmp_path: Path, made: tuple[Path, Path], wait: bool
) -> None:
    base, adapter = made
    fold_files(planned(base), tmp_path / "alone")
    with copying_ahead(base, adapter, tmp_path):
        if wait:
            copied_all()
        fold_files(planned(base), tmp_path / "with")
    assert content(tmp_path / "with") == content(tmp_path / "alone")
    one, two = (tmp_path / folder / "model-00000.safetensors" for folder in ("with", "alone"))
    assert one.stat().st_mode == two.stat().st_mode
    assert not nameless(tmp_path)
    verify(tmp_path / "with")


def test_what_is_guessed_wrong_is_written_by_the_fold(
    tmp_path: Path, made: tuple[Path, Path]
) -> None:
    base, _ = made
    other = tmp_path / "other"
    other.mkdir()
    save_file({"elsewhere.lora_A": np.ones((2, 2), np.float32)}, other / "adapter.safetensors")
    fold_files(planned(base), tmp_path / "alone")
    with copying_ahead(base, other, tmp_path):
        copied_all()
        fold_files(planned(base), tmp_path / "with")
    assert content(tmp_path / "with") == content(tmp_path / "alone")


def test_a_file_that_is_laid_out_anew_takes_no_copies(
    tmp_path: Path, made: tuple[Path, Path]
) -> None:
    base, adapter = made
    fold_files(planned(base), tmp_path / "alone", dtype="F32")
    with copying_ahead(base, adapter, tmp_path):
        copied_all()
        fold_files(planned(base), tmp_path / "with", dtype="F32")
    assert content(tmp_path / "with") == content(tmp_path / "alone")


def test_nothing_is_left_where_no_fold_takes_the_copies(
    tmp_path: Path, made: tuple[Path, Path]
) -> None:
    base, adapter = made
    room = tmp_path / "room"
    room.mkdir()
    with copying_ahead(base, adapter, room):
        copied_all()
        assert len(nameless(room)) == SHARDS
        assert not list(room.iterdir())
    assert not nameless(room)
    assert not list(room.iterdir())


def test_a_base_that_was_cut_short_is_left_to_the_fold(
    tmp_path: Path, made: tuple[Path, Path]
) -> None:
    base, adapter = made
    last = sorted(base.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    ahead = CopyAhead(base, adapter, tmp_path)
    copied_all()
    found = ahead.taken()
    ahead.end()
    let_go(found)
    assert last.name not in found
    assert len(found) == SHARDS - 1


def test_a_base_that_may_be_quantised_is_not_copied(
    tmp_path: Path, made: tuple[Path, Path]
) -> None:
    base, adapter = made
    name = "model-00000.safetensors"
    save_file({"layers.0.q.qweight": np.ones((4, 4), np.int32)}, base / name)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"] = {"layers.0.q.qweight": name}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    ahead = CopyAhead(base, adapter, tmp_path)
    copied_all()
    found = ahead.taken()
    ahead.end()
    assert not found
