"""Quantised weights that the package compressed-tensors makes, and what it reads in them."""

from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils.helpers import (
    calculate_qparams,
    generate_gparam,
    maybe_pad_tensor_for_block_quant,
)
from torch import Tensor

Made = tuple[dict[str, Tensor], dict[str, Any], Tensor]
GROUP = 16
PACKED, INTS, FLOATS, NVFP4, MXFP4 = (
    f"{name}-quantized" for name in ("pack", "int", "float", "nvfp4-pack", "mxfp4-pack")
)


def scheme_of(name: str, more: dict[str, Any] | None = None, **weights: Any) -> QuantizationScheme:
    """A scheme in a format, with arguments of its weights."""
    args = QuantizationArgs(**weights)
    return QuantizationScheme(targets=["Linear"], weights=args, format=name, **(more or {}))


def said_of(*schemes: QuantizationScheme, name: str | None = None) -> dict[str, Any]:
    """What config.json says of schemes."""
    config = QuantizationConfig(
        config_groups={f"group_{n}": scheme for n, scheme in enumerate(schemes)},
        format=name or str(schemes[0].format),
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head"],
    )
    return config.model_dump(mode="json")


def _blocks(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """The numbers that have a scale in common, along the last axis; the scales' shape before it."""
    rows, columns = weight.shape
    if args.strategy == "tensor":
        return weight.reshape(1, -1)
    if args.strategy == "block":
        high, wide = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, (high, wide))
        tiles = padded.reshape(padded.shape[0] // high, high, -1, wide).transpose(1, 2)
        return tiles.flatten(2)
    return weight.reshape(rows, -1, args.group_size or columns)


def compressed(weight: Tensor, scheme: QuantizationScheme) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a weight, and the weight that they mean, both by the package."""
    args = scheme.weights
    assert args is not None
    blocks = _blocks(weight, args)
    whole = generate_gparam(weight.min(), weight.max()) if scheme.format == NVFP4 else None
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, whole)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    if whole is not None:
        state["weight_global_scale"] = whole.float().reshape(1)
    compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
    made = compressor.compress(state, scheme)
    if scheme.format not in (NVFP4, MXFP4):
        meant = compressor.decompress(made, scheme)["weight"]
    else:  # it decompresses to bfloat16
        numbers = unpack_fp4_from_uint8(made["weight_packed"], *weight.shape, dtype=torch.float32)
        scales = compressor._decompress_scale(made["weight_scale"], torch.float32)
        more = args, torch.float32, made.get("weight_global_scale")
        meant = dequantize(numbers, scales, None, *more)
    return {f"m.{name}": value.contiguous() for name, value in made.items()}, meant


def _kind(name: str, **weights: Any) -> Callable[[Tensor], Made]:
    def made(weight: Tensor) -> Made:
        scheme = scheme_of(name, **weights)
        tensors, meant = compressed(weight, scheme)
        return tensors, said_of(scheme), meant

    return made


def in_order(weight: Tensor) -> Made:
    """Groups of inputs by the order of a calibration, which the package once wrote.

    The formula is of its documentation then: the inputs are sorted by their group for the scales.
    """
    scheme = scheme_of(PACKED, num_bits=4, strategy="group", group_size=GROUP)
    order = torch.randperm(weight.shape[1], generator=torch.manual_seed(2))
    tensors, meant = compressed(weight[:, order].contiguous(), scheme)
    numbers = unpack_from_int32(tensors["m.weight_packed"], 4, weight.shape)
    back = order.argsort()
    tensors["m.weight_packed"] = pack_to_int32(numbers[:, back].contiguous(), 4)
    tensors["m.weight_g_idx"] = (back // GROUP).int()
    said = said_of(scheme)
    said["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    return tensors, said, meant[:, back].contiguous()


_GROUPS = {"strategy": "group", "group_size": GROUP}
KINDS: dict[str, Callable[[Tensor], Made]] = {
    "packed": _kind(PACKED, num_bits=4, **_GROUPS),
    "packed_zeros": _kind(PACKED, num_bits=4, symmetric=False, **_GROUPS),
    "packed_channel": _kind(PACKED, num_bits=4, strategy="channel"),
    "packed_eight": _kind(PACKED, num_bits=8, symmetric=False, strategy="channel"),
    "packed_two": _kind(PACKED, num_bits=2, symmetric=False, **_GROUPS),
    "packed_in_order": in_order,
    "bytes": _kind(INTS, num_bits=8, strategy="channel"),
    "bytes_zeros": _kind(INTS, num_bits=8, symmetric=False, **_GROUPS),
    "bytes_tensor": _kind(INTS, num_bits=8, symmetric=False, strategy="tensor"),
    "bytes_four": _kind("naive-quantized", num_bits=4, **_GROUPS),
    "floats_tensor": _kind(FLOATS, num_bits=8, type="float", strategy="tensor"),
    "floats": _kind(FLOATS, num_bits=8, type="float", strategy="channel"),
    "floats_group": _kind("naive-quantized", num_bits=8, type="float", **_GROUPS),
    "floats_block": _kind(
        FLOATS, num_bits=8, type="float", strategy="block", block_structure=[16, 48]
    ),
    "mxfp4": _kind(
        MXFP4,
        num_bits=4,
        type="float",
        strategy="group",
        group_size=32,
        scale_dtype=torch.uint8,
    ),
    "nvfp4": _kind(NVFP4, num_bits=4, type="float", strategy="tensor_group", group_size=16),
}
