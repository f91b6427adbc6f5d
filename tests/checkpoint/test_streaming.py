"""The streamed fold on plans made by hand: exact, flat in memory, and never half-written."""

import filecmp
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from peftsurgery.checkpoint.certificate import verify
from peftsurgery.checkpoint.plan import FoldPlan, Planned
from peftsurgery.checkpoint.streaming import fold_files
from peftsurgery.checkpoint.unfolding import unfold_checkpoint
from peftsurgery.errors import SurgeryError
from peftsurgery.tensor_file import read_header
from tests.checkpoint import streamed

ROOT = Path(__file__).resolve().parents[2]


def started(*paths: Path) -> subprocess.Popen[str]:
    """A fold in a process of its own, that has begun."""
    command = [sys.executable, "-m", "tests.checkpoint.streamed", *map(str, paths)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a process says at its end, which is a good one."""
    said, _ = process.communicate()
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(said)
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_at_a_time_are_the_whole_and_the_process_has_no_torch(tmp_path: Path) -> None:
    base, adapter = streamed.made_at(tmp_path, 2, 5000)  # more elements than are computed at once
    said = ended(started(base, adapter, tmp_path / "out"))
    assert said["imported"] == []
    learnt = load_file(adapter)
    for number, path in enumerate(sorted(base.glob("*.safetensors"))):
        before, after = load_file(path), load_file(tmp_path / "out" / path.name)
        up, q = (f"layers.{number}.{kind}.weight" for kind in ("up", "q"))
        assert np.array_equal(before[up], after[up])
        A, B = (learnt[f"{number}.{name}"].astype(np.float64) for name in "AB")
        exact = before[q].astype(np.float64) + streamed.SCALE * (B @ A)
        nearest = exact.astype(np.float32).astype(ml_dtypes.bfloat16)
        assert np.mean(nearest != after[q]) < 1e-4  # where fp32's own rounding decides a tie
        error = np.abs(after[q].astype(np.float64) - exact)
        best = np.abs(nearest.astype(np.float64) - exact)
        assert (error <= best + 1e-5).all()
    unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    assert content(tmp_path / "back") == content(base)


@pytest.mark.slow
def test_memory_is_flat_whatever_the_size_of_the_base(tmp_path: Path) -> None:
    least = []
    for number, shards in enumerate((2, 8)):
        base, adapter = streamed.made_at(tmp_path / str(number), shards, 4096, 2048)
        # How the two threads fall together is chance, which moves the peak by some 20 MiB.
        outs = [tmp_path / str(number) / f"out{turn}" for turn in range(3)]
        peaks = [ended(started(base, adapter, out))["peak"] for out in outs]
        assert max(peaks) < 160 * 2**20
        least.append(min(peaks))
    assert least[1] < least[0] + 16 * 2**20


def test_a_file_of_any_size_beside_the_weights_is_copied_without_being_held(tmp_path: Path) -> None:
    base, adapter = streamed.made_at(tmp_path, 2, 16)
    with (base / "measured.dat").open("wb") as stream:
        stream.truncate(2**28)
        stream.seek(2**27 + 1)
        stream.write(b"in the middle")
    assert ended(started(base, adapter, tmp_path / "out"))["peak"] < 160 * 2**20
    assert filecmp.cmp(base / "measured.dat", tmp_path / "out" / "measured.dat", shallow=False)
    assert verify(tmp_path / "out").files > 0


def test_runs_that_are_killed_and_resumed_write_what_one_run_writes(tmp_path: Path) -> None:
    base, adapter = streamed.made_at(tmp_path, 6, 1024)
    plan = streamed.plan_of(6)
    fold_files(Planned(plan, base, read_header(adapter)), tmp_path / "whole", reversible=True)
    before, draw = content(base), random.Random(0)
    out, killed = tmp_path / "out", 0
    while killed < 6:  # fifty times: test_survival.py
        process = started(base, adapter, out)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
        if out.exists():  # it was done before it was killed: begin again
            assert content(out) == content(tmp_path / "whole")
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
    report = fold_files(
        Planned(plan, base, read_header(adapter)), out, resume=True, reversible=True
    )
    assert content(out) == content(tmp_path / "whole")
    assert content(base) == before
    assert len(report.changed) == 6
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]


def test_a_file_that_was_damaged_since_is_written_again(tmp_path: Path) -> None:
    base, adapter = streamed.made_at(tmp_path, 3, 16)
    plan, given = streamed.plan_of(3), read_header(adapter)
    fold_files(Planned(plan, base, given), tmp_path / "whole")
    interrupted = FoldPlan(plan.sites, record=plan.record, files={"bad\0name": b""})
    with pytest.raises(ValueError, match="null byte"):
        fold_files(Planned(interrupted, base, given), tmp_path / "out")
    part = tmp_path / "out.part"
    shards = sorted(part.glob("*.safetensors"))
    assert len(shards) == 3
    data = bytearray(shards[1].read_bytes())
    data[-1] ^= 1
    shards[1].write_bytes(data)
    report = fold_files(Planned(plan, base, given), tmp_path / "out", resume=True)
    assert report.resumed == (shards[0].name, shards[2].name)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert verify(tmp_path / "out").tensors == 6


@pytest.mark.parametrize("where", ["plan", "base", "adapter", "value"])
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path, where: str) -> None:
    base, adapter = streamed.made_at(tmp_path, 2, 16)
    plan, given = streamed.plan_of(2), read_header(adapter)
    code = "PSG416"
    if where == "plan":
        plan = FoldPlan(plan.sites[:1], record=plan.record)  # leaves tensors of the adapter out
    elif where == "base":
        plan = FoldPlan(plan.sites, replaced={"layers.9.weight": "0.A"}, record=plan.record)
    elif where == "adapter":
        plan = FoldPlan(plan.sites, replaced={"layers.0.up.weight": "new"}, record=plan.record)
    else:
        code = "PSG505"
        tensor = given.tensors["1.A"]
        with adapter.open("r+b") as stream:
            stream.seek(given.offset + tensor.start)
            stream.write(np.float32("nan").tobytes())
    with pytest.raises(SurgeryError, match=code):
        fold_files(Planned(plan, base, given), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "base"]


@pytest.mark.parametrize(
    "damage",
    [
        {"layers.0.q.weight": "../outside.safetensors"},
        {"layers.0.q.weight": "/etc/passwd"},
        {"layers.0.q.weight": "missing.safetensors"},
        {"layers.0.q.weight": "model-00001.safetensors"},
        {"layers.0.q.weight": 3},
        {"layers.7.q.weight": "model-00000.safetensors"},
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    base, adapter = streamed.made_at(tmp_path, 2, 16)
    file = base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **damage}}))
    with pytest.raises(SurgeryError, match="PSG207"):
        fold_files(Planned(streamed.plan_of(2), base, read_header(adapter)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
