"""The files of a base that are not its weights: they go with what is folded from it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download

from peftsurgery.model_files import WEIGHT_FILES, is_weights, pipeline_parts
from peftsurgery.tokenizer_files import is_tokenizer_file


def companions(origin: str) -> Path | None:
    """The directory that holds a base's files, without its weights if it has to be fetched."""
    if Path(origin).is_dir():
        return Path(origin)
    try:
        return Path(snapshot_download(origin, ignore_patterns=list(WEIGHT_FILES)))
    except (OSError, ValueError):
        return None


def copy_missing(source: Path, folder: Path, has_tokenizer: bool) -> Iterator[str]:
    """Copy what is not weights and not written yet; model cards stay, they describe the base.

    The files of a tokenizer belong together: with ``has_tokenizer``, the base's stay behind.

    Of the directories inside, those that a pipeline's modules.json lists come whole, with weights
    of their own, and others if they hold no weights (of the model before, in another format).
    """
    parts = pipeline_parts(source)
    for entry in sorted(source.iterdir()):
        name = entry.name
        if name.startswith(".") or name == "README.md" or (folder / name).exists():
            continue
        if has_tokenizer and is_tokenizer_file(name):
            continue
        if entry.is_dir() and (name in parts or not any(map(is_weights, entry.rglob("*")))):
            shutil.copytree(entry, folder / name, copy_function=shutil.copyfile)
            yield f"{name}/"
        elif entry.is_file() and not is_weights(entry):
            shutil.copyfile(entry, folder / name)
            yield name
