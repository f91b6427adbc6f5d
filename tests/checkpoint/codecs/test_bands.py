"""Weights of codecs that are folded band by band: the same bytes as of all rows at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftsurgery.checkpoint import fold_site, requantised
from peftsurgery.checkpoint.codecs.coded import plain_view
from peftsurgery.checkpoint.plan import Planned
from peftsurgery.checkpoint.streaming import fold_files
from peftsurgery.model_files import read_model_files
from peftsurgery.tensor_file import read_header
from tests.checkpoint.codecs.encoders import ENCODERS
from tests.checkpoint.codecs.peak import COUNT
from tests.checkpoint.streamed import SCALE, plan_of

COLUMNS = 384


def made_at(folder: Path, kind: str, rows: int, columns: int = COLUMNS) -> Path:
    """A base of two weights, and factors whose products are exact in any order of sums."""
    draw = torch.Generator().manual_seed(0)
    part = torch.randn((min(rows, 512), columns), generator=draw) / 20
    tensors, said, _ = ENCODERS[kind](part.repeat(-(-rows // 512), 1)[:rows])
    named = {
        f"layers.{n}.q{key.removeprefix('m')}": value.clone()
        for n in range(COUNT)
        for key, value in tensors.items()
    }
    save_file(named, folder / "model.safetensors")
    config = {"dtype": "bfloat16", "quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))
    halves = {
        name: torch.randint(-3, 4, shape, generator=draw).float() / 32
        for n in range(COUNT)
        for name, shape in ((f"{n}.A", (4, columns)), (f"{n}.B", (rows, 4)))
    }
    (folder.parent / "adapter").mkdir()
    adapter = folder.parent / "adapter/adapter.safetensors"
    save_file(halves, adapter)
    return adapter


def written(folder: Path, adapter: Path, name: str, again: bool) -> dict[str, Any]:
    out = folder.parent / name
    fold_files(Planned(plan_of(COUNT), folder, read_header(adapter)), out, requantise=again)
    return dict(load_file(out / "model.safetensors"))


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_weight_has_the_bytes_that_its_codec_makes_of_it_as_a_whole(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    adapter = made_at(base, kind, 152 if "awq" in kind or "gptq" in kind else 150)
    for module in (fold_site, requantised):
        monkeypatch.setattr(module, "BLOCK", 8 * COLUMNS)
    factors = load_file(adapter)
    found = {again: written(base, adapter, f"out-{again}", again) for again in (False, True)}
    for n in range(COUNT):
        weight = plain_view(read_model_files(base)).coded[f"layers.{n}.q.weight"]
        exact = weight.values() + SCALE * (factors[f"{n}.B"] @ factors[f"{n}.A"]).numpy()
        plain = torch.from_numpy(exact).to(torch.bfloat16)
        assert torch.equal(found[False][f"layers.{n}.q.weight"], plain)
        parts = weight.stored()
        made = {**parts, **weight.codec.encode(exact, parts, weight.said)}
        for name, (_, tensor) in weight.parts.items():
            mine = found[True][tensor.name].reshape(-1).view(torch.uint8).numpy()
            assert np.array_equal(mine, made[name].reshape(-1).view(np.uint8)), name


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["plain", "again"])
@pytest.mark.parametrize("kind", ["nf4_nested", "int8", "fp8", "packed_zeros", "nvfp4"])
def test_memory_is_flat_whatever_the_size_of_a_quantised_weight(
    tmp_path: Path, kind: str, again: bool
) -> None:
    (tmp_path / "base").mkdir()
    adapter = made_at(tmp_path / "base", kind, 4096, 4096)
    arguments = [
        str(tmp_path / "base"),
        str(adapter),
        str(tmp_path / "out"),
        "again" if again else "",
    ]
    command = [sys.executable, "-m", "tests.checkpoint.codecs.peak", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 160 * 2**20
