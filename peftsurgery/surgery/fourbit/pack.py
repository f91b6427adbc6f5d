"""Packing a matrix into four bits a number, and unpacking it: bitsandbytes does the numerics.

A packed matrix is one tensor of bytes. For n numbers in blocks of ``block``:

    double      4 * ceil(blocks / 256)   scales of the scales, fp32
                4                        their offset, fp32
                blocks                   scales, 8 bits
    otherwise   4 * blocks               scales, fp32
    both        ceil(n / 2)              numbers, 4 bits

The bytes are those of bitsandbytes' own QuantState. Since they are bytes, casting a model leaves
them alone, and they move between devices as one.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import torch

from peftsurgery.errors import SurgeryError
from peftsurgery.language.storage import Storage
from peftsurgery.quiet import unlogged

GROUP = 256  # so many scales share a scale of their own, in bitsandbytes
PACKABLE = (torch.float32, torch.bfloat16, torch.float16)


class Recipe(NamedTuple):
    """How a weight was packed: storage, original (out, in) shape and dtype.

    ``turned`` says that the model keeps it as (in, out).
    """

    storage: tuple[str, int, bool]
    shape: tuple[int, int]
    dtype: torch.dtype
    turned: bool = False


def recipe_of(storage: Storage, shape: tuple[int, ...], dtype: torch.dtype, turned: bool) -> Recipe:
    """The recipe for a weight that the model keeps in this shape, which is (in, out) if turned."""
    rows, columns = shape[::-1] if turned else shape
    return Recipe((storage.format, storage.block, storage.double), (rows, columns), dtype, turned)


def pack(weight: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Pack a weight into four bits; returns bytes. Raises PSG325 for NaN, PSG326 without bnb."""
    library = bitsandbytes()
    kind, block, double = recipe.storage
    if not torch.isfinite(weight).all():
        raise SurgeryError("PSG325", "a weight that holds NaN or infinity cannot be quantised")
    matrix = (weight.T if recipe.turned else weight).detach().contiguous()
    numbers, state = library.quantize_4bit(
        matrix, blocksize=block, compress_statistics=double, quant_type=kind
    )
    parts = [state.absmax, numbers]
    if double:
        parts = [state.state2.absmax, state.offset.reshape(1), *parts]
    return torch.cat([part.reshape(-1).contiguous().view(torch.uint8) for part in parts])


def unpack(packed: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Unpack bytes into the weight, in its original dtype and orientation."""
    library = bitsandbytes()
    (kind, block, double), shape, dtype, turned = recipe
    blocks = -(-shape[0] * shape[1] // block)
    state: dict[str, Any] = {}
    start = 0
    if double:
        start = 4 * -(-blocks // GROUP) + 4
        scales, offset = packed[: start - 4], packed[start - 4 : start]
        state["offset"] = offset.view(torch.float32)[0]
        state["state2"] = library.QuantState(
            scales.view(torch.float32),
            code=_scale_codes(packed.device),
            blocksize=GROUP,
            dtype=torch.float32,
        )
    end = start + (blocks if double else 4 * blocks)
    absmax = packed[start:end] if double else packed[start:end].view(torch.float32)
    whole = library.QuantState(
        absmax, torch.Size(shape), blocksize=block, quant_type=kind, dtype=dtype, **state
    )
    matrix: torch.Tensor = library.dequantize_4bit(packed[end:].view(-1, 1), whole)
    return matrix.T if turned else matrix


@cache
def bitsandbytes() -> Any:
    """The functions of bitsandbytes. PSG326 if it is not installed or does not run here."""
    try:
        with unlogged():  # it advertises a faster product for processors, which is not used here
            return importlib.import_module("bitsandbytes.functional")
    except (ImportError, OSError, RuntimeError) as error:
        message = f"four-bit weights need bitsandbytes, which cannot be imported: {error}"
        raise SurgeryError("PSG326", message, "pip install 'peftsurgery[quantise]'") from None


@cache
def _scale_codes(device: torch.device) -> torch.Tensor:
    """Values that the 256 codes of a quantised scale stand for."""
    codes: torch.Tensor = bitsandbytes().create_dynamic_map()
    return codes.to(device)


class PackedWeight(NamedTuple):
    """A packed weight: its recipe, the dtype its products are computed in, and who packed it."""

    recipe: Recipe
    compute: torch.dtype | None
    adapter: str
