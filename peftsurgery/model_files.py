"""The weights of a model's directory: one file, or shards that an index lists."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftsurgery.errors import SurgeryError
from peftsurgery.files import absence, read_object
from peftsurgery.tensor_file import Tensor, TensorFile, read_header

# What the files of a model's weights are called, in any format; a copy in another than safetensors
# would be that of the model before.
WEIGHT_FILES = (
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5"),
    *("*.msgpack", "*.gguf", "*.onnx", "*.onnx.data", "*.onnx_data", "*.ot", "*.tflite"),
    "*.pt2",
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
RECORD = "peftsurgery.json"
"""What was folded into these weights."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model's weights, in the order of their names, and what their index says.

    ``index`` is None for a single file.
    """

    folder: Path
    files: tuple[TensorFile, ...]
    index: Mapping[str, Any] | None

    @property
    def tensors(self) -> dict[str, tuple[TensorFile, Tensor]]:
        """Every tensor by its name, with the file that it is in."""
        return {n: (file, tensor) for file in self.files for n, tensor in file.tensors.items()}


def refuse_program(path: str | Path) -> None:
    """Refuse a program of torch.export in the place of a model or an adapter. PSG227.

    It is told by its name and not opened: reading one unpickles.
    """
    if Path(path).suffix.lower() == ".pt2" and os.path.isfile(path):
        message = f"'{path}' is a program of torch.export; reading it could run code that is in it"
        hint = "name the model or the surgery that it was made of"
        raise SurgeryError("PSG227", message, hint)


def read_model_files(folder: Path) -> ModelFiles:
    """Read the headers of a model's weights, as transformers would find them.

    PSG207 if there are none, a shard is missing, damaged or outside the directory, or the index
    names a tensor that is not there.
    """
    index, names = _named(folder)
    if not names:
        hint = "weights are read from safetensors only"
        what = f"'{folder}' holds neither {SINGLE} nor {INDEX}"
        raise SurgeryError("PSG207", what if folder.is_dir() else absence(folder, SINGLE), hint)
    files = tuple(read_header(folder / name) for name in names)
    held = {name: file.path.name for file in files for name in file.tensors}
    if sum(len(file.tensors) for file in files) != len(held):
        raise SurgeryError("PSG207", f"two shards of '{folder}' hold a tensor of one name")
    for name, shard in index["weight_map"].items() if index is not None else ():
        if held.get(name) != shard:
            message = f"{folder / INDEX} has '{name}' in {shard}, and it is in"
            raise SurgeryError("PSG207", f"{message} {held.get(name, 'none of the shards')}")
    return ModelFiles(folder, files, index)


def are_here(folder: Path) -> bool:
    """Whether a directory holds a model's weights, all the files that its index names.

    PSG207 for a damaged index.
    """
    _, names = _named(folder)
    return bool(names) and all((folder / name).is_file() for name in names)


def weight_names(folder: Path) -> list[str]:
    """The names of the files of a model's weights, if any. PSG207 for a damaged index."""
    return _named(folder)[1]


def _named(folder: Path) -> tuple[Mapping[str, Any] | None, list[str]]:
    """The index of a model's weights, if it has one, and the names of their files, if any."""
    if (folder / SINGLE).exists():
        return None, [SINGLE]
    if not (folder / INDEX).exists():
        return None, []
    index = read_object(folder / INDEX, "PSG207")
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where:
        raise SurgeryError("PSG207", f"{folder / INDEX} has no 'weight_map'")
    for name, shard in where.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
            message = f"{folder / INDEX} has '{name}' in {shard!r:.80}, which is no file beside it"
            raise SurgeryError("PSG207", message)
    return index, sorted(set(where.values()))


def other_files(folder: Path) -> dict[str, Path]:
    """The files of a model's directory that hold no weights of it, by their paths beneath it.

    Links to files are followed, as in the hub's cache; hidden files are left out. The parts of a
    pipeline that modules.json lists come whole, with weights of their own.
    """
    parts, found = pipeline_parts(folder), {}
    for around, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(around, name) for name in sorted(names) if not name.startswith(".")):
            name = path.relative_to(folder)
            if path.is_file() and (not is_weights(path) or name.parts[0] in parts):
                found[str(name)] = path
    return found


def pipeline_parts(folder: Path) -> set[str]:
    """The directories that sentence-transformers' modules.json names."""
    try:
        listed = json.loads((folder / "modules.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return set()
    listed = listed if isinstance(listed, list) else []
    paths = (entry.get("path") for entry in listed if isinstance(entry, dict))
    return {Path(path).parts[0] for path in paths if isinstance(path, str) and path}


def is_weights(file: Path) -> bool:
    """Whether a file is, by its name, one of a model's weights."""
    return any(file.match(pattern) for pattern in WEIGHT_FILES)
