"""The files of a tokenizer, and how many tokens it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST = 2**24  # more tokens than any model has

# What the files of a tokenizer are called; those of one model belong together.
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "bpe.codes", "emoji.json", "chat_template*", "additional_chat_templates/*"),
)


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of the tokenizer in a directory, by their names there; none if there is none."""
    if not (folder / "tokenizer_config.json").is_file():
        return {}
    found = {file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)}
    files = sorted(file for file in found if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def is_tokenizer_file(name: str) -> bool:
    """Whether a file, by its name in a model's directory, is one of a tokenizer's."""
    return any(Path(name).match(pattern.removesuffix("/*")) for pattern in _TOKENIZER_FILES)


def tokens_needed(folder: Path) -> int:
    """How many tokens the tokenizer in a directory needs for those that were added to it; or 0."""
    ids: list[Any] = []
    for file, part in (("tokenizer.json", "added_tokens"), ("added_tokens.json", None)):
        if not (folder / file).is_file():
            continue
        try:
            read = json.loads((folder / file).read_text(encoding="utf-8"))
            found = read if part is None else {str(n): t["id"] for n, t in enumerate(read[part])}
            ids += found.values()
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # another kind of tokenizer, or none
    return max((i + 1 for i in ids if isinstance(i, int) and i < MOST), default=0)
