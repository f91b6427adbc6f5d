"""The command that folds files, killed and out of room: it goes on to the same bytes."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest

from tests.checkpoint.loras import llama, saved_lora

ROOT = Path(__file__).resolve().parents[2]
KILLS, DISKS = 50, 20
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 512}
# with a date of its own for each run, the certificates would differ
SURROUNDINGS = {**os.environ, "SOURCE_DATE_EPOCH": "0"}
# In namespaces of their own, a process may mount a disk, and nothing of it is left when it ends.
ALONE = ["unshare", "--user", "--map-root-user", "--mount"]
# SIZE DISK SAVED COMMAND...: folds to a disk of so many bytes, makes room, and goes on.
ON_A_SMALL_DISK = """
size=$1 disk=$2 saved=$3; shift 3
mount -t tmpfs -o size="$size" tmpfs "$disk" || exit 99
code=0; "$@" -o "$disk/out" --json >"$saved/first.json" || code=$?
mount -o remount,size=256m tmpfs "$disk"
test ! -e "$disk/out" || exit 98
"$@" -o "$disk/out" --resume --json >"$saved/second.json" || exit 97
cp -r "$disk/out" "$saved/out"
exit "$code"
"""


def folding(folder: Path) -> list[str]:
    """The command, for a base of many files and an adapter of peft's, made in ``folder``."""
    model = llama(**SIZES)
    model.bfloat16().save_pretrained(str(folder / "base"), max_shard_size="700KB")
    assert len(list((folder / "base").glob("*.safetensors"))) > 6
    saved_lora(folder / "adapter", base=model)
    command = [sys.executable, "-m", "peftsurgery", "fold", str(folder / "adapter")]
    return [*command, "--base", str(folder / "base"), "--reversible"]


def hashes(folder: Path) -> dict[str, str]:
    """The hash of each file."""
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def run(command: list[str], *more: object) -> None:
    """Run a command that must succeed."""
    subprocess.run(
        [*command, *map(str, more)], cwd=ROOT, env=SURROUNDINGS, check=True, capture_output=True
    )


@pytest.mark.slow
def test_fifty_kills_at_random_moments_end_in_the_bytes_of_one_run(tmp_path: Path) -> None:
    command = folding(tmp_path)
    before = [hashes(tmp_path / name) for name in ("base", "adapter")]
    begun = time.monotonic()
    run(command, "-o", tmp_path / "whole")
    seconds, draw = time.monotonic() - begun, random.Random(0)
    out, whole = tmp_path / "out", hashes(tmp_path / "whole")
    struck = 0
    for _ in range(KILLS):
        again = [
            *command,
            "-o",
            str(out),
            *(["--resume"] if tmp_path.joinpath("out.part").exists() else []),
        ]
        with subprocess.Popen(
            again, cwd=ROOT, env=SURROUNDINGS, stdout=subprocess.DEVNULL
        ) as process:
            try:
                process.wait(draw.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                struck += 1
        if out.exists():  # it was done before it was killed: begin again
            assert hashes(out) == whole
            shutil.rmtree(out)
    run(command, "-o", out, "--resume")
    assert hashes(out) == whole
    assert [hashes(tmp_path / name) for name in ("base", "adapter")] == before
    assert struck > KILLS / 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out", "whole"]


@pytest.mark.slow
def test_full_disks_are_coded_errors_and_the_fold_goes_on_when_there_is_room(
    tmp_path: Path,
) -> None:
    if subprocess.run([*ALONE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False).returncode:
        pytest.skip("this system lets no process mount a disk of its own")
    command = folding(tmp_path)
    run(command, "-o", tmp_path / "whole")
    whole = hashes(tmp_path / "whole")
    needed = sum(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    for number in range(DISKS):
        saved = tmp_path / f"saved{number}"
        saved.mkdir()
        size = max(4096, needed * number // DISKS)
        script = ["sh", "-c", ON_A_SMALL_DISK, "sh", str(size), str(disk), str(saved)]
        done = subprocess.run(
            [*ALONE, *script, *command],
            cwd=ROOT,
            env=SURROUNDINGS,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 3, done.stderr.decode()
        said = json.loads((saved / "first.json").read_text())
        assert said["error"]["code"] == "PSG603", said
        assert "No space left" in said["error"]["message"]
        assert hashes(saved / "out") == whole
