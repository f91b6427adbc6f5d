"""Headers of safetensors files: what the library writes is read, what lies is refused."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from peftsurgery.errors import SurgeryError
from peftsurgery.tensor_file import MAX_HEADER, header_of, laid_out, read_header


def written(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(start: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((0, 4), np.int8)}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = read_header(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    assert {n: t.shape for n, t in file.tensors.items()} == {"a": (0, 4), "b": (2, 3)}
    b = file.tensors["b"]
    content = (tmp_path / "x.safetensors").read_bytes()[file.offset :][b.start : b.end]
    assert content == arrays["b"].tobytes()


def test_what_is_written_the_library_reads_and_it_is_the_same_each_time(tmp_path: Path) -> None:
    tensors = laid_out([("z", "F32", (2,)), ("a", "F16", ())])
    header = header_of(tensors, {"format": "pt", "more": "é"})
    assert header == header_of(tensors, {"format": "pt", "more": "é"})
    assert len(header) % 8 == 0
    data = np.float32([1, 2]).tobytes() + np.float16(3).tobytes()
    (tmp_path / "x.safetensors").write_bytes(header + data)
    found = load_file(tmp_path / "x.safetensors")
    assert found["z"].tolist() == [1, 2]
    assert found["a"].tolist() == 3


def test_metadata_of_null_are_none_as_mlx_and_the_library_have_it(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", {"__metadata__": None, "a": entry()}, b"1" * 8)
    assert load_file(path).keys() == {"a"}
    assert read_header(path).metadata == {}


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        ({"a": entry()}, b"12345678x", "the file at"),
        ({"a": entry()}, b"1234567", "the file at"),
        ({"a": entry(), "b": entry(4, 12)}, b"1" * 12, "overlaps"),
        ({"a": entry(), "b": entry(0, 8)}, b"1" * 8, "overlaps"),
        ({"a": entry(), "b": entry(12, 20)}, b"1" * 20, "hole"),
        ({"a": entry(4, 12)}, b"1" * 12, "hole"),
        ({"a": entry(shape=[3])}, b"1" * 8, "which its shape has not"),
        ({"a": entry(shape=[-2])}, b"1" * 8, "are none"),
        ({"a": entry(shape=[2.0])}, b"1" * 8, "are none"),
        ({"a": entry(shape=[True, 2])}, b"1" * 8, "are none"),
        ({"a": entry(shape=[2**40, 2**40])}, b"1" * 8, "no tensor has"),
        ({"a": entry(dtype="F33")}, b"1" * 8, "no dtype"),
        ({"a": entry(dtype=["F32"])}, b"1" * 8, "are none"),
        ({"a": {**entry(), "more": 1}}, b"1" * 8, "not just"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"1" * 8, "not just"),
        ({"a": 3}, b"", "not just"),
        ({"": entry()}, b"1" * 8, "no name"),
        ({"a\0b": entry()}, b"1" * 8, "no name"),
        ({"__metadata__": {"a": 1}}, b"", "not texts"),
        ({"__metadata__": []}, b"", "not texts"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        (b'{"a": NaN}', b"", "no number"),
        (b"[1, 2]", b"", "no JSON object"),
        (b'{"a"', b"", "Expecting"),
        (b"\xff\xfe{}", b"", "decode"),
        (b"[" * 100_000, b"", "recursion"),
        ({"a": entry(0, 1, (3,), "F4")}, b"1", "whole bytes"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, data: bytes, why: str) -> None:
    path = written(tmp_path / "x.safetensors", header, data)
    with pytest.raises(SurgeryError, match=why) as refused:
        read_header(path, "PSG207")
    assert refused.value.code == "PSG207"
    assert str(path) in refused.value.message


@pytest.mark.parametrize("length", [0, 1, 3, 2**20, MAX_HEADER + 1, 2**63, 2**64 - 1])
def test_a_length_that_no_header_has_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(SurgeryError, match="PSG207"):
        read_header(written(tmp_path / "x.safetensors", {"a": entry()}, b"1" * 8, length))


def test_a_fifo_a_directory_and_nothing_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "short").write_bytes(b"123")
    for name in ("fifo", "short", "missing", "."):
        with pytest.raises(SurgeryError, match="PSG505"):
            read_header(tmp_path / name, "PSG505")


@given(st.binary(max_size=200), st.integers(0, 250))
def test_no_bytes_end_in_anything_but_a_refusal(data: bytes, length: int) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp"), f"fuzz-{os.getpid()}.safetensors")
    path.write_bytes(length.to_bytes(8, "little") + data)
    code = None
    try:
        names = read_header(path).tensors.keys()
    except SurgeryError as refused:
        code, names = refused.code, {}.keys()
    finally:
        path.unlink()
    assert code == "PSG207" or names <= set(json.loads(data[:length]))
