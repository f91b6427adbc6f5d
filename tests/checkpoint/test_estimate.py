"""What a fold is said to take, beside what it takes."""

import json
import struct
from pathlib import Path

import pytest

from peftsurgery.checkpoint.estimate import estimate
from peftsurgery.checkpoint.plan import Planned
from peftsurgery.checkpoint.streaming import fold_files
from peftsurgery.tensor_file import read_header
from tests.checkpoint import streamed


@pytest.mark.parametrize("dtype", [None, "F32"])
def test_the_bytes_that_are_said_are_the_bytes_that_are_written(
    tmp_path: Path, dtype: str | None
) -> None:
    base, adapter = streamed.made_at(tmp_path, 3, 64)
    planned, out = Planned(streamed.plan_of(3), base, read_header(adapter)), tmp_path / "out"
    said = estimate(planned, out, dtype)
    assert not out.exists()
    report = fold_files(planned, out, dtype)
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    written = sum(sizes.values()) - sizes["peftsurgery.json"]
    # of another dtype, headers and index have a few digits more
    assert said.write == said.disk
    assert 0 <= written - said.write <= (0 if dtype is None else 100)
    assert (said.changed, said.tensors) == (3, report.tensors)
    assert said.fold == 3 * 64 * 512 * 2
    assert estimate(planned, out, reversible=True).disk == said.fold + estimate(planned, out).write


def sparse(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """A safetensors file in bf16 that takes no room on the disk."""
    header, end = {}, 0
    for name, (rows, columns) in shapes.items():
        start, end = end, end + 2 * rows * columns
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def test_a_base_larger_than_the_disk_is_planned_without_being_read(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    size = (2**16, 2**17)
    shapes = {f"layers.{n}.{kind}.weight": size for n in range(20) for kind in ("q", "up")}
    sparse(tmp_path / "base" / "model.safetensors", shapes)
    (tmp_path / "base" / "config.json").write_text("{}")
    halves = {"A": (4, size[1]), "B": (size[0], 4)}
    learnt = {f"{n}.{name}": shape for n in range(20) for name, shape in halves.items()}
    sparse(tmp_path / "adapter.safetensors", learnt)
    adapter = read_header(tmp_path / "adapter.safetensors")
    planned = Planned(streamed.plan_of(20), tmp_path / "base", adapter)
    said = estimate(planned, tmp_path / "out")
    assert said.fold == 20 * 2**34
    assert said.read == 40 * 2**34 + 20 * 2 * 4 * (2**17 + 2**16)
    assert said.memory < 160 * 2**20 < said.free < said.disk
    assert f"{said.disk / 1e9:.2f} GB needed" in str(said)
