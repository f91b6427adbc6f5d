"""DoRA of kohya's trainer, LyCORIS and diffusers, imported as peft has it.

The oracle is arXiv:2402.09353: each row of ``W + scale B A`` is given the length that the file has,
computed here in double precision of the numbers that were written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.numpy import load_file, save_file

import peftsurgery as ps
from tests.checkpoint.loras import llama
from tests.formats.test_import_adapter import image, random

TAPS = {"down_blocks.0": (8, 3, 3, 3), "proj_in": (8, 8, 1, 1), "to_q": (6, 8)}
SHAPES = {
    "one number a row": lambda out, ones: (out,),
    "as wide as the kernel": lambda out, ones: (out, 1, *ones),
    "as in peft": lambda out, ones: (1, out, *ones) if ones else (out,),
}


def written(path: str, joined: bool) -> tuple[str, dict[str, str]]:
    """A module's name and those of its tensors' parts, of kohya's and of diffusers."""
    if joined:
        parts = {"down": "lora_down.weight", "up": "lora_up.weight", "m": "dora_scale"}
        return f"lora_unet_{path.replace('.', '_')}", parts
    parts = {"down": "lora_A.weight", "up": "lora_B.weight", "m": "lora_magnitude_vector"}
    return f"unet.{path}", parts


def tensors_of(path: str, shape: Any, joined: bool) -> tuple[dict[str, Any], Any, Any]:
    """A module's tensors, its change, and the lengths of its rows."""
    out, *into = TAPS[path]
    ones = [1] * (len(into) - 1)
    down, up = random(3, *into), random(out, 3, *ones)
    lengths = np.abs(random(out)) + 1
    name, parts = written(path, joined)
    tensors = {f"{name}.{parts['down']}": down, f"{name}.{parts['up']}": up}
    tensors[f"{name}.{parts['m']}"] = lengths.reshape(shape(out, ones))
    change = up.reshape(out, 3).astype(float) @ down.reshape(3, -1).astype(float)
    return tensors, change, lengths.astype(float)


@pytest.mark.parametrize(
    ("joined", "shape"),
    [(True, "one number a row"), (True, "as wide as the kernel"), (False, "as in peft")],
)
def test_rows_have_the_lengths_of_the_file(joined: bool, shape: str, tmp_path: Path) -> None:
    model = image()[0]
    tensors, expected = {}, {}
    for path in TAPS:
        more, change, lengths = tensors_of(path, SHAPES[shape], joined)
        tensors |= more
        if joined:
            tensors[f"{written(path, joined)[0]}.alpha"] = np.array(1.5, np.float32)
        weight = model.get_submodule(path).weight.detach().double().numpy()
        moved = weight.reshape(len(weight), -1) + 0.5 * change
        moved *= (lengths / np.linalg.norm(moved, axis=1))[:, None]
        expected[path] = moved.reshape(weight.shape)
    said = {"unet.r": 3, "unet.lora_alpha": 1.5, "unet.use_dora": True}
    metadata = None if joined else {"lora_adapter_metadata": json.dumps(said)}
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    ps.import_adapter(tmp_path / "lora.safetensors", tmp_path / "out", f"{__name__}:image")
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    adapter = PeftModel.from_pretrained(model, tmp_path / "out")
    assert ours.keys() == get_peft_model_state_dict(adapter).keys()
    sample = image()[1]["sample"] + torch.from_numpy(random(2, 3, 8, 8))
    before_merging = adapter(sample)
    merged = adapter.merge_and_unload()
    for path, value in expected.items():
        found = merged.get_submodule(path).weight.detach().double().numpy()
        assert np.abs(found - value).max() < 1e-5, path
    assert (merged(sample) - before_merging).abs().max() < 1e-4


BROKEN: dict[str, tuple[Any, str]] = {
    "columns": (lambda out, ones: (1, 8), r"PSG520: .*dora_scale' is \[1, 8\]: .* each input of"),
    "columns, flat": (lambda out, ones: (8,), r"PSG520: .*dora_scale' is \[8\]: .* each input of"),
    "neither": (lambda out, ones: (5, 1), r"PSG507: .*dora_scale' is \[5, 1\], and the weight of"),
    "turned": (lambda out, ones: (1, 6), r"PSG507: .*dora_scale' is \[1, 6\], and the weight of"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_other_magnitudes_are_refused(kind: str, tmp_path: Path) -> None:
    shape, message = BROKEN[kind]
    tensors, _, _ = tensors_of("to_q", SHAPES["one number a row"], True)
    tensors["lora_unet_to_q.dora_scale"] = random(*shape(6, []))
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ps.SurgeryError, match=message):
        ps.import_adapter(tmp_path / "lora.safetensors", tmp_path / "out", f"{__name__}:image")
    assert not (tmp_path / "out").exists()


def test_columns_of_a_square_kernel_are_told_by_their_place(tmp_path: Path) -> None:
    tensors, _, _ = tensors_of("proj_in", lambda out, ones: (1, out, *ones), True)
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ps.SurgeryError, match=r"PSG520: .* \[1, 8, 1, 1\]: .* each input"):
        ps.import_adapter(tmp_path / "lora.safetensors", tmp_path / "out", f"{__name__}:image")


def test_magnitudes_of_some_modules_are_refused(tmp_path: Path) -> None:
    tensors, _, _ = tensors_of("to_q", SHAPES["one number a row"], True)
    others, _, _ = tensors_of("proj_in", SHAPES["one number a row"], True)
    del others["lora_unet_proj_in.dora_scale"]
    save_file(tensors | others, tmp_path / "lora.safetensors")
    with pytest.raises(ps.SurgeryError, match="PSG520: 'proj_in' has no magnitude, and other"):
        ps.import_adapter(tmp_path / "lora.safetensors", tmp_path / "out", f"{__name__}:image")
    assert not (tmp_path / "out").exists()


def test_a_magnitude_of_a_table_is_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    vocabulary, width = llama().model.embed_tokens.weight.shape
    tensors = {"lora_down.weight": random(2, vocabulary), "lora_up.weight": random(width, 2)}
    named = {f"model.embed_tokens.{n}": value for n, value in tensors.items()}
    named["model.embed_tokens.dora_scale"] = random(width)
    save_file(named, tmp_path / "lora.safetensors")
    with pytest.raises(ps.SurgeryError, match=r"PSG520: .* has a magnitude, and .* is a table"):
        ps.import_adapter(tmp_path / "lora.safetensors", tmp_path / "out", tmp_path / "base")


def test_metadata_of_magnitudes_that_another_model_has_are_refused(tmp_path: Path) -> None:
    tensors, _, _ = tensors_of("to_q", SHAPES["as in peft"], False)
    own = {n: value for n, value in tensors.items() if "magnitude" not in n}
    other = {n.replace("unet.", "text_encoder."): value for n, value in tensors.items()}
    said = json.dumps({"unet.r": 3, "unet.lora_alpha": 3, "unet.use_dora": True})
    file = tmp_path / "lora.safetensors"
    save_file(own | other, file, {"lora_adapter_metadata": said})
    with pytest.raises(ps.SurgeryError, match=r"PSG520: .* use_dora is True"):
        ps.import_adapter(file, tmp_path / "out", f"{__name__}:image", part="unet")
