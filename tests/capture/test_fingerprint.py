"""A base is known again by its weights: whatever does no harm is the same, whatever does is not."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftsurgery as ps
from peftsurgery.capture.fingerprint import Weights, print_as, weights_of
from peftsurgery.capture.sources import Source, open_source
from peftsurgery.fingerprint import BLOCK, WHOLE, Fingerprint, in_file, in_folder, spans
from tests.formats.made import model_directory
from tests.models.zoo import ZOO


def fingerprint(source: Source) -> Fingerprint:
    weights = weights_of(source)
    assert isinstance(weights, Weights)
    return weights.fingerprint


def of_directory(folder: Path) -> Fingerprint:
    return fingerprint(open_source(str(folder)))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "bart", "resnet"])
def test_a_model_in_memory_its_files_and_their_shards_are_one_base(
    name: str, tmp_path: Path
) -> None:
    model: Any = ZOO[name].build()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    live = fingerprint(Source(model))
    reloaded = fingerprint(Source(type(model).from_pretrained(tmp_path / "whole")))
    files = [of_directory(tmp_path / each) for each in ("whole", "shards")]
    assert live.tensors == reloaded.tensors == files[0].tensors == files[1].tensors
    assert len({each.digest for each in (live, reloaded, *files)}) == 1
    assert Fingerprint.parse(json.loads(json.dumps(live.to_dict()))) == live


def test_the_header_is_what_the_library_reads(tmp_path: Path) -> None:
    folder = model_directory("mixtral", tmp_path, torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    found = in_file(folder / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        content = tensor.view(torch.uint8).numpy().tobytes()
        assert found[name].read([(0, tensor.numel())]) == content
        assert found[name].read([(1, 3)]) == content[2:6]


CHANGES: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "one value of a small tensor": lambda t: t["model.norm.weight"][5:6].add_(1e-3),
    "the sign of a zero": lambda t: t["model.norm.weight"].copy_(
        torch.where(torch.arange(len(t["model.norm.weight"])) == 3, -0.0, t["model.norm.weight"])
    ),
    "one value anywhere": lambda t: t["model.layers.1.mlp.up_proj.weight"][17, 9].add_(1e-3),
    "two layers exchanged": lambda t: t.update(
        {
            f"model.layers.{n}.self_attn.q_proj.weight": t[
                f"model.layers.{1 - n}.self_attn.q_proj.weight"
            ].clone()
            for n in (0, 1)
        }
    ),
    "a shape": lambda t: t.update({"model.norm.weight": t["model.norm.weight"][None].clone()}),
    "a dtype": lambda t: t.update({"model.norm.weight": t["model.norm.weight"].double()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_has_another_fingerprint(change: str, tmp_path: Path) -> None:
    folder = model_directory("llama", tmp_path / "model")
    before = of_directory(folder)
    tensors = load_file(folder / "model.safetensors")
    CHANGES[change](tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert of_directory(folder).digest != before.digest


@pytest.mark.parametrize("count", [0, 1, WHOLE, WHOLE + 1, 10**6, 10**11])
def test_what_is_hashed_of_a_tensor_reaches_from_its_first_element_to_its_last(count: int) -> None:
    chosen = spans(count)
    assert chosen[0][0] == 0
    assert chosen[-1][1] == count
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(chosen))
    assert sum(end - first for first, end in chosen) <= max(WHOLE, 32 * BLOCK)


def test_a_large_tensor_is_read_in_samples_that_a_cast_keeps(tmp_path: Path) -> None:
    large = torch.randn(300, 1000)
    save_file({"large": large, "turned": large.T.contiguous()}, tmp_path / "model.safetensors")
    stored = in_folder(tmp_path)["large"]
    flat = large.flatten()
    content = b"".join(flat[a:b].numpy().tobytes() for a, b in spans(flat.numel()))
    assert stored.read(spans(stored.count)) == content
    module = torch.nn.Module()
    module.large = torch.nn.Parameter(large)
    module.turned = torch.nn.Parameter(large.T)  # not contiguous
    live = weights_of(Source(module))
    assert live is not None
    rounded = {
        name: load_file(tmp_path / "model.safetensors")[name].bfloat16()
        for name in ("large", "turned")
    }
    (tmp_path / "half").mkdir()
    save_file(rounded, tmp_path / "half" / "model.safetensors")
    for name, half in in_folder(tmp_path / "half").items():
        content = half.read(spans(half.count))
        cast = print_as(live.tensors[name], "BF16")
        assert cast.content == hashlib.blake2b(content, digest_size=16).hexdigest()
        assert cast != live.tensors[name].print()


@pytest.mark.parametrize(
    "damage",
    [b"", b"\0" * 8, (2**63).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7 + b"[]", None],
)
def test_damaged_weights_are_refused(damage: bytes | None, tmp_path: Path) -> None:
    folder = model_directory("llama", tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] if damage is None else damage)
    with pytest.raises(ps.SurgeryError, match="PSG207"):
        in_folder(folder)


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../model.safetensors"}}']
)
def test_a_damaged_index_is_refused(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ps.SurgeryError, match="PSG207"):
        in_folder(tmp_path)


def test_weights_that_are_not_all_here_have_no_fingerprint(tmp_path: Path) -> None:
    model: Any = ZOO["llama"].build()
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    shutil.copytree(tmp_path / "shards", tmp_path / "part")
    min((tmp_path / "part").glob("*.safetensors")).unlink()
    assert weights_of(open_source(str(tmp_path / "part"))) is None
    assert weights_of(Source(ZOO["llama"].build().to("meta"))) is None
