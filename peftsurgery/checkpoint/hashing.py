"""Hashes by which a certificate knows tensors and files again.

What is written now is hashed with BLAKE3, which no one can forge either and which reads several
times as fast as SHA-256 where a processor has no instructions for that. A certificate names its
algorithm; those that name none were written before, with SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from blake3 import blake3

from peftsurgery.checkpoint.tensor_bytes import chunks, file_chunks
from peftsurgery.tensor_file import Tensor, TensorFile


class Digest(Protocol):
    """A hash under way."""

    def update(self, data: Any, /) -> Any:
        """Take in bytes."""

    def hexdigest(self) -> str:
        """The hash of all bytes so far, in hexadecimal digits."""


ALGORITHMS: Mapping[str, Callable[[], Digest]] = MappingProxyType(
    {"blake3": blake3, "sha256": hashlib.sha256}
)
ALGORITHM, BEFORE = "blake3", "sha256"


def new_digest(algorithm: str = ALGORITHM) -> Digest:
    """A hash of nothing yet."""
    return ALGORITHMS[algorithm]()


def hash_of_bytes(content: bytes) -> str:
    """Hash of bytes."""
    digest = new_digest()
    digest.update(content)
    return digest.hexdigest()


def hash_of(file: TensorFile, tensor: Tensor, algorithm: str = ALGORITHM) -> str:
    """Hash of a tensor's bytes."""
    digest = new_digest(algorithm)
    for chunk in chunks(file, tensor):
        digest.update(chunk)
    return digest.hexdigest()


def hash_of_file(path: Path, algorithm: str = ALGORITHM) -> str:
    """Hash of a file's bytes."""
    digest = new_digest(algorithm)
    for chunk in file_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def hash_of_header(file: TensorFile, algorithm: str = ALGORITHM) -> str:
    """Hash of all that is before the tensors of a file."""
    digest = new_digest(algorithm)
    with file.path.open("rb") as stream:
        digest.update(stream.read(file.offset))
    return digest.hexdigest()
