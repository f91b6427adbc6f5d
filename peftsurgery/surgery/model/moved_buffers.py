"""Buffers that training changed, such as running statistics of batch norms.

They are no adapter's, but what was trained with them needs them: a saved surgery holds those that
differ from the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from peftsurgery.errors import SurgeryError


def moved_buffers(mine: Mapping[str, Tensor], base: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Buffers that differ from the base's, by name.

    What is on meta has not moved.
    """
    return {
        name: buffer
        for name, buffer in mine.items()
        if not buffer.is_meta and not torch.equal(buffer.cpu(), base(name).to("cpu", buffer.dtype))
    }


def put_buffers(mine: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Write values into buffers, by name.

    PSG308 for a shape, PSG606 for numbers that the buffer cannot hold.
    """
    for name, value in given.items():
        buffer = mine[name]
        if buffer.shape != value.shape:
            shapes = f"{list(value.shape)}, not {list(buffer.shape)}"
            raise SurgeryError("PSG308", f"'{name}' has shape {shapes}")
        if not torch.can_cast(value.dtype, buffer.dtype):
            dtypes = f"{value.dtype}, and the buffer {buffer.dtype}"
            raise SurgeryError("PSG606", f"'{name}' holds {dtypes}")
        buffer.copy_(value)
