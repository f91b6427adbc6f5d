"""Quantised bases that are folded into and quantised again: by what rule, and what survives."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peftsurgery as ps
from peftsurgery.checkpoint.codecs import packed
from peftsurgery.checkpoint.codecs.coded import CodedWeight, plain_view
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.streamed_fold import estimate_fold
from peftsurgery.model_files import read_model_files
from tests.checkpoint.codecs.encoders import ENCODERS
from tests.checkpoint.codecs.test_coded import SMALL, quantised, weight
from tests.formats.stored import ALPHA, RANK, adapter_at, base_at, content, tensors_of


def coded(folder: Path, kind: str, rows: int, columns: int) -> CodedWeight:
    """A weight as a quantiser keeps it, read from a file."""
    tensors, said, _ = ENCODERS[kind](weight(rows, columns))
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    return plain_view(read_model_files(folder)).coded["m.weight"]


def change(rows: int, columns: int, size: float) -> np.ndarray[Any, Any]:
    """A change of low rank."""
    draw = np.random.default_rng(1)
    factors = draw.standard_normal((rows, 3)), draw.standard_normal((3, columns))
    return (size * factors[0] @ factors[1]).astype(np.float32)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("shape", [(32, 64), (72, 128)])
@pytest.mark.parametrize("size", [0.0, 0.01, 0.1, 2.0])
def test_a_weight_that_is_quantised_again_is_as_near_as_its_quantiser_comes(
    tmp_path: Path, kind: str, shape: tuple[int, int], size: float
) -> None:
    mine = coded(tmp_path, kind, *shape)
    parts, before = mine.stored(), mine.values()
    exact = before + change(*shape, size)
    made = mine.codec.encode(exact, parts, mine.said)
    assert made.keys() <= parts.keys()
    assert all(made[n].shape == parts[n].shape and made[n].dtype == parts[n].dtype for n in made)
    found = mine.values_of({**parts, **made})
    if not size:  # what does not change stays what it was
        np.testing.assert_array_equal(found, before)
        return
    _, _, fresh = ENCODERS[kind](torch.from_numpy(exact))
    mean, theirs = np.square(found - exact).mean(), np.square(fresh.numpy() - exact).mean()
    # nested scales are quantised themselves, and lie on a grid that bitsandbytes shifts
    if kind != "nvfp4" or size < 1:  # the scale of all of it stays, and reaches no further
        assert mean <= theirs * (1.02 if kind == "nf4_nested" else 1.000001)
    assert mean <= np.square(before - exact).mean()


@pytest.mark.parametrize(("kind", "size"), [("nf4", 64), ("fp4", 64), ("int8", 128)])
@pytest.mark.parametrize("far", [0.01, 0.1, 2.0])
def test_each_block_has_the_nearest_numbers_of_the_better_scale(
    tmp_path: Path, kind: str, size: int, far: float
) -> None:
    mine = coded(tmp_path, kind, 72, 128)
    parts, before = mine.stored(), mine.values()
    exact = before + change(72, 128, far)
    found = mine.values_of({**parts, **mine.codec.encode(exact, parts, mine.said)})
    table = parts["table"] if "table" in parts else np.arange(-127, 128, dtype=np.float32) / 127
    scale = "absmax" if "absmax" in parts else "scale"
    for block, kept, written in zip(
        exact.reshape(-1, size), parts[scale].reshape(-1), found.reshape(-1, size), strict=True
    ):
        tried = [each * table for each in (kept, np.abs(block).max())]
        errors = [np.abs(block[:, None] - grid).min(1) for grid in tried]
        best = min(float(np.square(error).sum()) for error in errors)
        assert float(np.square(written - block).sum()) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("kind", ["gptq_shuffled", "gptq_v2", "awq"])
def test_groups_that_are_quantised_at_once_are_as_each_by_itself(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = coded(tmp_path, kind, 64, 512)
    values, parts = mine.values() + change(64, 512, 0.02), mine.stored()
    found = []
    for size in (1, 2**13, 2**20):
        monkeypatch.setattr(packed, "AT_ONCE", size)
        found.append(mine.codec.encode(values, parts, mine.said))
    for other in found[1:]:
        for name, value in found[0].items():
            np.testing.assert_array_equal(other[name], value)
    monkeypatch.undo()
    whole = mine.codec.decode({**parts, **found[0]}, mine.said)
    assert np.linalg.norm(whole - values) < 0.3 * np.linalg.norm(values)


@pytest.mark.parametrize("kind", ["fp8", "gptq_shuffled", "gptq_eight", "gptq_v2", "awq"])
def test_a_scale_stays_unless_values_leave_its_reach(tmp_path: Path, kind: str) -> None:
    mine = coded(tmp_path, kind, 72, 128)
    parts, before = mine.stored(), mine.values()
    exact = before.copy()
    groups = parts.get("groups", np.arange(128) // 16)
    exact[5, 7] = exact[5, np.flatnonzero(groups == groups[7])[-1]]  # a number of its own grid
    made = mine.codec.encode(exact, parts, mine.said)
    scale = "scale" if "scale" in parts else "scales"
    assert np.array_equal(made[scale], parts[scale])
    found = mine.values_of({**parts, **made})
    np.testing.assert_array_equal(found, exact)
    exact[5, 7] = 90.0  # far beyond
    made = mine.codec.encode(exact, parts, mine.said)
    assert (made[scale] != parts[scale]).sum() == 1
    found = mine.values_of({**parts, **made})
    assert abs(found[5, 7] - 90) < 100 / 15  # a step, where zeros less one cannot be -1
    same = made[scale] == parts[scale]
    assert (found == before).mean() > 0.95
    assert same.mean() > 0.9


def test_zeros_of_symmetric_groups_stay_in_the_middle(tmp_path: Path) -> None:
    mine = coded(tmp_path, "gptq_v2", 32, 64)
    parts = mine.stored()
    parts["zeros"][:] = np.array(0x88888888, np.uint32).view(np.int32)
    exact = mine.values_of(parts)
    exact[3, 3] = -50.0
    made = mine.codec.encode(exact, parts, mine.said)
    assert np.array_equal(made["zeros"], parts["zeros"])
    assert mine.values_of({**parts, **made})[3, 3] == pytest.approx(-50, rel=1e-3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("again")
    base = base_at(root / "base", "Llama", torch.bfloat16, "1GB", **SMALL)
    return base, adapter_at(root / "lora", base, target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize(
    "kind",
    [
        *("fp8", "fp8_whole", "nf4", "nf4_nested", "gptq_shuffled", "awq", "int8"),
        *("packed_zeros", "packed_in_order", "bytes_tensor", "floats_block", "nvfp4", "mxfp4"),
    ],
)
def test_a_fold_quantises_again_what_it_changes_and_copies_the_rest(
    tmp_path: Path, llama: tuple[Path, Path], kind: str
) -> None:
    base = shutil.copytree(llama[0], tmp_path / "base")
    (base / "quantize_config.json").write_text("{}")
    meant, before = quantised(base, kind), content(base)
    report = ps.fold_checkpoint(llama[1], base, tmp_path / "out", requantise=True)
    was, now = tensors_of(base), tensors_of(tmp_path / "out")
    assert {n: (v.shape, v.dtype) for n, v in was.items()} == {
        n: (v.shape, v.dtype) for n, v in now.items()
    }
    moved = {n.split(".")[4] for n in was if not torch.equal(was[n].float(), now[n].float())}
    assert moved == {"q_proj", "down_proj"}
    for name in ("config.json", "quantize_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == before[name]
    # what survived, told by what is there and by what peft's formula says
    learnt = load_file(llama[1] / "adapter_model.safetensors")
    written = plain_view(read_model_files(tmp_path / "out")).coded
    sums = np.zeros(3)
    for module in {key.removesuffix("A.weight") for key in learnt if key.endswith("A.weight")}:
        name = f"{module.removeprefix('base_model.model.').removesuffix('.lora_')}.weight"
        factors = [learnt[f"{module}{which}.weight"].double() for which in "BA"]
        wanted = (ALPHA / RANK * factors[0] @ factors[1]).numpy()
        done = written[name].values() - meant[name].double().numpy()
        mine = np.array([(wanted * done).sum(), ((done - wanted) ** 2).sum(), (wanted**2).sum()])
        stored = written[name].parts["weight"][1].name
        told = report.changed[stored]
        assert told["survived"] == pytest.approx(mine[0] / mine[2], rel=1e-3)
        assert told["lost"] == pytest.approx(mine[1] ** 0.5, rel=1e-3)
        sums += mine
    said = json.loads((tmp_path / "out/peftsurgery.json").read_text())["requantised"]
    assert said["weights"] == 4
    assert said["survived"] == pytest.approx(sums[0] / sums[2], rel=1e-3)
    assert said["lost"] == pytest.approx((sums[1] / sums[2]) ** 0.5, rel=1e-3)
    assert f"{said['survived']:.1%} of the change survived" in str(report)
    assert report.to_dict()["requantised"] == said
    assert content(base) == before
    assert ps.verify(tmp_path / "out").tensors == len(was)
    ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back", base)
    before.pop("pytorch_model.bin")
    assert content(tmp_path / "back") == before


@pytest.mark.parametrize("kind", ["nf4", "nf4_nested", "int8"])
def test_transformers_loads_what_is_quantised_again_into_bitsandbytes_layers(
    tmp_path: Path, llama: tuple[Path, Path], kind: str
) -> None:
    base = shutil.copytree(llama[0], tmp_path / "base")
    quantised(base, kind)
    ps.fold_checkpoint(llama[1], base, tmp_path / "out", requantise=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    written = plain_view(read_model_files(tmp_path / "out")).coded
    assert len(written) == 14
    for name, mine in written.items():
        kept = model.get_parameter(name)
        if kind == "int8":
            read = kept.CB.float() * kept.SCB[:, None] / 127
        else:
            read = dequantize_4bit(kept.data, kept.quant_state).float()
        np.testing.assert_allclose(mine.values(), read.numpy(), rtol=2**-7, atol=1e-6)


def test_residuals_restore_what_was_quantised_again(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    base = shutil.copytree(llama[0], tmp_path / "base")
    quantised(base, "nf4_nested")
    before = content(base)
    ps.fold_checkpoint(llama[1], base, tmp_path / "out", requantise=True, reversible=True)
    base.rename(tmp_path / "hidden")
    ps.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    before.pop("pytorch_model.bin")
    assert content(tmp_path / "back") == before


def in_shards(base: Path, count: int) -> None:
    """Put the tensors of a base into so many files, parts of one weight into several of them."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"{number}.safetensors": names[number::count] for number in range(count)}
    where = {name: shard for shard, mine in shards.items() for name in mine}
    for shard, mine in shards.items():
        save_file({name: tensors[name] for name in mine}, base / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq", "nf4_nested"])
def test_a_run_that_is_killed_and_resumed_quantises_as_one_run_does(
    tmp_path: Path, llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    base = shutil.copytree(llama[0], tmp_path / "base")
    quantised(base, kind)
    in_shards(base, 8)
    ps.fold_checkpoint(llama[1], base, tmp_path / "whole", requantise=True)
    size = sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors"))
    script = (
        "import os, sys; from pathlib import Path\n"
        "from peftsurgery.formats.streamed_fold import fold_checkpoint as fold\n"
        "left, journal = int(sys.argv[4]), Path(sys.argv[3] + '.part', '.journal')\n"
        "def progress(size):\n"
        "    global left; left -= size\n"
        "    if left < 0 and '.safetensors' in journal.read_text(): os.kill(os.getpid(), 9)\n"
        "fold(*sys.argv[1:4], resume=True, requantise=True, progress=progress)\n"
    )
    places = [str(llama[1]), str(base), str(tmp_path / "out")]
    for share in (0.1, 0.3):
        command = [sys.executable, "-c", script, *places, str(int(share * size))]
        assert subprocess.run(command).returncode == -9
        assert not (tmp_path / "out").exists()
    report = ps.fold_checkpoint(llama[1], base, tmp_path / "out", requantise=True, resume=True)
    assert report.resumed  # not all was done twice
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_parts_write_what_one_process_writes(
    tmp_path: Path, llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    base = shutil.copytree(llama[0], tmp_path / "base")
    quantised(base, "gptq")
    in_shards(base, 2)
    ps.fold_checkpoint(llama[1], base, tmp_path / "out", requantise=True)
    for part in ("2/2", "1/2"):
        ps.fold_checkpoint(llama[1], base, tmp_path / "parts", requantise=True, part=part)
    assert content(tmp_path / "parts") == content(tmp_path / "out")
    # a run that was to write plain numbers is not gone on with
    ps.fold_checkpoint(llama[1], base, tmp_path / "other", requantise=True, part="1/2")
    with pytest.raises(SurgeryError, match="PSG610"):
        ps.fold_checkpoint(llama[1], base, tmp_path / "other", part="2/2")


def test_a_dry_run_tells_the_size_of_what_is_quantised_again(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    base = shutil.copytree(llama[0], tmp_path / "base")
    quantised(base, "awq")
    found = estimate_fold(llama[1], base, tmp_path / "out", requantise=True)
    ps.fold_checkpoint(llama[1], base, tmp_path / "out", requantise=True)
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert found.changed == 4
    assert 0 <= size - found.write < 20_000  # the certificate and the card


def test_what_cannot_be_quantised_again_is_refused(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    with pytest.raises(SurgeryError, match=r"PSG416.*no quantised weights"):
        ps.fold_checkpoint(llama[1], llama[0], tmp_path / "out", requantise=True)
    base = shutil.copytree(llama[0], tmp_path / "base")
    quantised(base, "gptq")
    with pytest.raises(SurgeryError, match=r"PSG904.*dtype"):
        ps.fold_checkpoint(llama[1], base, tmp_path / "out", requantise=True, dtype="float32")
    large = shutil.copytree(llama[1], tmp_path / "large")
    learnt = load_file(large / "adapter_model.safetensors")
    grown = {name: value * 1e5 for name, value in learnt.items()}
    save_file(grown, large / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match=r"PSG402.*overflows gptq"):
        ps.fold_checkpoint(large, base, tmp_path / "out", requantise=True)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "large"}


def test_a_change_that_is_lost_is_told(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    base = shutil.copytree(llama[0], tmp_path / "base")
    quantised(base, "awq")
    small = shutil.copytree(llama[1], tmp_path / "small")
    learnt = load_file(small / "adapter_model.safetensors")
    less = {name: value * 1e-4 for name, value in learnt.items()}
    save_file(less, small / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match="PSG415"):
        ps.fold_checkpoint(small, base, tmp_path / "out", requantise=True)
    report = ps.fold_checkpoint(
        small, base, tmp_path / "out", requantise=True, allow_unchanged=True
    )
    assert report.to_dict()["requantised"]["survived"] == 0
    assert "changed 0 of" in str(report)
    assert tensors_equal(tmp_path / "out", base)


def tensors_equal(one: Path, other: Path) -> bool:
    mine, theirs = tensors_of(one), tensors_of(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.slow
def test_the_command_quantises_again_without_torch(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    base = shutil.copytree(llama[0], tmp_path / "base")
    quantised(base, "fp8")
    code = (
        "import sys; from peftsurgery.cli.root import root; "
        "rc = 0\ntry: root(sys.argv[1:])\nexcept SystemExit as e: rc = e.code\n"
        "print(rc, sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    asked = ["fold", llama[1], "--base", base, "-o", tmp_path / "out", "--requantise"]
    command = [sys.executable, "-c", code, *map(str, asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert "of the change survived" in done.stdout
    command[-2] = str(tmp_path / "other")  # it is not removed after it was written
    done = subprocess.run([*command, "--verify"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "3 []", done.stderr
    assert "PSG215" in done.stderr
    assert not (tmp_path / "other").exists()
