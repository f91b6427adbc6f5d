"""Tensors in safetensors that others may have made: finite numbers that can be computed with.

What reads takes the code that its caller refuses with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from peftsurgery.errors import SurgeryError
from peftsurgery.tensor_file import read_header

# The dtypes of torch by the names that the format has for them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What parameters can be; the eight-bit floats are for storage, and nothing is computed in them.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(
    file: Path, code: str, dtypes: Collection[torch.dtype] = FLOATS
) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, in memory of their own; refused if they cannot be used."""
    try:
        read_header(file, code)
        # copies, since arithmetic rounds otherwise where memory is aligned as in the file
        tensors = {name: value.clone() for name, value in load_file(file).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise SurgeryError(code, f"{file} cannot be read: {error}") from None
    check_tensors(file, tensors, code, dtypes)
    return tensors


def check_tensors(
    file: Path,
    tensors: Mapping[str, torch.Tensor],
    code: str,
    dtypes: Collection[torch.dtype] = FLOATS,
) -> None:
    """Refuse tensors of other dtypes, and numbers that are not finite."""
    for name, value in tensors.items():
        if value.dtype not in dtypes:
            needed = "float16, bfloat16, float32 or float64 is needed"
            raise SurgeryError(code, f"{file}: '{name}' holds {value.dtype}, where {needed}")
        if not torch.isfinite(value).all():
            raise SurgeryError(code, f"{file}: '{name}' holds NaN or infinity")


def as_safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Tensors as the content of a safetensors file."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save(plain, metadata={"format": "pt"})
