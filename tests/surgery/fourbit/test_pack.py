"""Packed weights are bitsandbytes' own, byte for byte, and as small as they are said to be."""

from __future__ import annotations

import math

import pytest
import torch

import peftsurgery as ps
from peftsurgery.language.storage import Storage
from peftsurgery.surgery.fourbit.pack import pack, recipe_of, unpack

library = pytest.importorskip("bitsandbytes.functional")

STORAGES = [
    Storage("nf4", 64, True, None),
    Storage("nf4", 128, False, None),
    Storage("fp4", 64, True, None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: f"{s.format}-{s.double}")
@pytest.mark.parametrize("turned", [False, True])
def test_what_is_unpacked_is_what_bitsandbytes_unpacks(
    storage: Storage, dtype: torch.dtype, turned: bool
) -> None:
    weight = torch.randn(96, 200).to(dtype)
    recipe = recipe_of(storage, tuple(weight.shape), dtype, turned)
    assert recipe.shape == ((200, 96) if turned else (96, 200))
    matrix = (weight.T if turned else weight).contiguous()
    numbers, state = library.quantize_4bit(
        matrix,
        blocksize=storage.block,
        compress_statistics=storage.double,
        quant_type=storage.format,
    )
    expected = library.dequantize_4bit(numbers, state)
    packed = pack(weight, recipe)
    found = unpack(packed, recipe)
    assert found.dtype == dtype
    assert torch.equal(found, expected.T if turned else expected)
    blocks = math.ceil(weight.numel() / storage.block)
    scales = 4 * math.ceil(blocks / 256) + 4 + blocks if storage.double else 4 * blocks
    assert packed.dtype == torch.uint8
    assert packed.numel() == scales + weight.numel() // 2


def test_a_weight_with_no_number_in_it_is_refused() -> None:
    weight = torch.ones(64, 64)
    weight[3, 5] = math.nan
    with pytest.raises(ps.SurgeryError, match="PSG325"):
        pack(weight, recipe_of(STORAGES[0], (64, 64), torch.float32, False))
