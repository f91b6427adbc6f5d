"""Certificates: hashes by the algorithm that they name, and those from before they named one."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from safetensors.numpy import load_file

from peftsurgery.checkpoint.certificate import verify
from peftsurgery.checkpoint.plan import Planned
from peftsurgery.checkpoint.streaming import fold_files
from peftsurgery.checkpoint.unfolding import unfold_checkpoint
from peftsurgery.errors import SurgeryError
from peftsurgery.tensor_file import read_header
from tests.checkpoint import streamed


@pytest.fixture
def folded(tmp_path: Path) -> Path:
    base, adapter = streamed.made_at(tmp_path, 2, 16)
    planned = Planned(streamed.plan_of(2), base, read_header(adapter))
    fold_files(planned, tmp_path / "out", reversible=True)
    return tmp_path / "out"


def rewritten(folder: Path, **changes: Any) -> dict[str, Any]:
    """The certificate, with other things in it."""
    file = folder / "peftsurgery.json"
    said = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    return said


def as_before(folder: Path, base: Path) -> None:
    """Write the certificate as it was when all hashes were SHA-256, made here with hashlib."""
    said = rewritten(folder)
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        old = load_file(base / shard.name)
        for name, value in load_file(shard).items():
            entry = {k: v for k, v in said["tensors"][name].items() if k != "blake3"}
            if "base" in entry:
                entry["base"] = hashlib.sha256(old[name].tobytes()).hexdigest()
            tensors[name] = {**entry, "sha256": hashlib.sha256(value.tobytes()).hexdigest()}
    heads = {}
    for name in said["headers"]:
        content = (folder / name).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        heads[name] = hashlib.sha256(content[:end]).hexdigest()
    files = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in said["files"]}
    rewritten(folder, tensors=tensors, headers=heads, files=files, algorithm=None)


def test_hashes_are_blake3s_of_what_is_there_and_what_was(folded: Path) -> None:
    said = json.loads((folded / "peftsurgery.json").read_text())
    assert said["algorithm"] == "blake3"
    for shard in folded.glob("*.safetensors"):
        old = load_file(folded.with_name("base") / shard.name)
        for name, value in load_file(shard).items():
            entry, before = said["tensors"][name], blake3(old[name].tobytes()).hexdigest()
            assert entry["blake3"] == blake3(value.tobytes()).hexdigest()
            assert entry.get("base", entry["blake3"]) == before
    config = (folded / "config.json").read_bytes()
    assert said["files"]["config.json"] == blake3(config).hexdigest()


def test_certificates_of_sha256_are_checked_and_unfolded(folded: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    as_before(folded, base)
    assert verify(folded).changed == 2
    unfold_checkpoint(folded, tmp_path / "back")
    unfold_checkpoint(folded, tmp_path / "again", base=base)
    for shard in base.iterdir():
        for back in ("back", "again"):
            assert (tmp_path / back / shard.name).read_bytes() == shard.read_bytes()
    shard = min(folded.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SurgeryError, match="PSG417"):
        verify(folded)


@pytest.mark.parametrize("algorithm", ["md5", 3, None, ["blake3"]])
def test_other_algorithms_are_refused(folded: Path, algorithm: Any) -> None:
    rewritten(folded, algorithm=algorithm)  # None: the hashes are not under the name of SHA-256
    with pytest.raises(SurgeryError, match="PSG609"):
        verify(folded)


@pytest.mark.parametrize(
    "changes", [{"added": None}, {"added": [1]}, {"coded": []}, {"coded": {"a": 1}}]
)
def test_what_lists_nothing_is_refused(folded: Path, changes: dict[str, Any]) -> None:
    file = folded / "peftsurgery.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(SurgeryError, match="PSG609"):
        verify(folded)


@pytest.mark.parametrize(
    "residual",
    [
        [0],
        [],
        "ab",
        ["model-00000.safetensors.residual", -1],
        ["", 0],
        ["../x", 0],
        ["a", 2**63],
        None,
    ],
)
def test_residuals_that_are_nowhere_are_refused(
    folded: Path, tmp_path: Path, residual: Any
) -> None:
    tensors = json.loads((folded / "peftsurgery.json").read_text())["tensors"]
    tensors["layers.0.q.weight"]["residual"] = residual
    rewritten(folded, tensors=tensors)
    with pytest.raises(SurgeryError, match="PSG609"):
        unfold_checkpoint(folded, tmp_path / "back")
    assert not list(tmp_path.glob("*back*"))


def test_a_residual_that_is_a_pipe_does_not_hang(folded: Path, tmp_path: Path) -> None:
    file = folded / "model-00000.safetensors.residual"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(SurgeryError, match=r"PSG417.*regular"):
        unfold_checkpoint(folded, tmp_path / "back")
