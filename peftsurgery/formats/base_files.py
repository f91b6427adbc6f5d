"""The files of a base that are not its weights: they go with what is folded from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download

from peftsurgery.surgery.model.saved.build import is_tokenizer_file

# What the files of a model's weights are called, in any format; they are of the model before.
_WEIGHT_FILES = (
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5"),
    *("*.msgpack", "*.gguf", "*.onnx", "*.onnx.data", "*.ot"),
)


def companions(origin: str) -> Path | None:
    """The directory that holds a base's files, without its weights if it has to be fetched."""
    if Path(origin).is_dir():
        return Path(origin)
    try:
        return Path(snapshot_download(origin, ignore_patterns=list(_WEIGHT_FILES)))
    except (OSError, ValueError):
        return None


def copy_missing(source: Path, folder: Path, has_tokenizer: bool = False) -> Iterator[str]:
    """Copy what is not weights and not written yet; model cards stay, they describe the base.

    The files of a tokenizer belong together: with ``has_tokenizer``, the base's stay behind.

    Of the directories inside, those that a pipeline's modules.json lists come whole, with weights
    of their own, and others if they hold no weights (of the model before, in another format).
    """
    parts = _pipeline_parts(source)
    for entry in sorted(source.iterdir()):
        name = entry.name
        if name.startswith(".") or name == "README.md" or (folder / name).exists():
            continue
        if has_tokenizer and is_tokenizer_file(name):
            continue
        if entry.is_dir() and (name in parts or not any(map(_is_weights, entry.rglob("*")))):
            shutil.copytree(entry, folder / name, copy_function=shutil.copyfile)
            yield f"{name}/"
        elif entry.is_file() and not _is_weights(entry):
            shutil.copyfile(entry, folder / name)
            yield name


def _pipeline_parts(source: Path) -> set[str]:
    """The directories that sentence-transformers' modules.json names."""
    try:
        listed = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        return {Path(str(part["path"])).parts[0] for part in listed if part.get("path")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return set()


def _is_weights(file: Path) -> bool:
    return any(file.match(pattern) for pattern in _WEIGHT_FILES)
