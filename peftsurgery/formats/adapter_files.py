"""Adapter files of any library: validated when read, written whole or not at all.

See :mod:`peftsurgery.files`, which reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from peftsurgery.errors import SurgeryError
from peftsurgery.finite_tensors import check_tensors, read_tensors


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, in memory of their own. PSG505 if it is damaged or not finite."""
    tensors = read_tensors(file, "PSG505")
    _check_any(file, tensors)
    return tensors


def check_adapter_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a file without tensors, or with some that hold no finite numbers. PSG505."""
    _check_any(file, tensors)
    check_tensors(file, tensors, "PSG505")


def _check_any(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    if not tensors:
        raise SurgeryError("PSG505", f"{file} holds no tensors")
