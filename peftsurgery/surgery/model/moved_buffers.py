"""Buffers that training changed, such as running statistics of batch norms.

They are no adapter's, but what was trained with them needs them: a saved surgery holds those that
differ from the base's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftsurgery.capture.names import join
from peftsurgery.errors import SurgeryError

if TYPE_CHECKING:
    from peftsurgery.surgery.model.operated import OperatedModel


def moved_buffers(model: OperatedModel) -> dict[str, Tensor]:
    """The persistent buffers that differ from the base's, by name."""
    mine = {name: buffer for name, buffer in _persistent(model) if not buffer.is_meta}
    if mine:
        model.base.bind()
    return {
        name: buffer
        for name, buffer in mine.items()
        if not torch.equal(buffer.cpu(), model.base.get_buffer(name).to("cpu", buffer.dtype))
    }


def put_buffers(model: OperatedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take over the buffers among saved tensors; the others are returned.

    PSG308 for a shape, PSG606 for numbers that the buffer cannot hold.
    """
    buffers = {name for name, _ in _persistent(model)}
    given = {name: value for name, value in tensors.items() if name in buffers}
    if given:
        model.bind()
    for name, value in given.items():
        mine = model.get_buffer(name)
        if mine.shape != value.shape:
            raise SurgeryError(
                "PSG308", f"'{name}' has shape {list(value.shape)}, not {list(mine.shape)}"
            )
        if not torch.can_cast(value.dtype, mine.dtype):
            raise SurgeryError(
                "PSG606", f"'{name}' holds {value.dtype}, and the buffer {mine.dtype}"
            )
        mine.copy_(value)
    return {name: value for name, value in tensors.items() if name not in given}


def _persistent(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, part in model.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield join(path, name), buffer
