"""Quantised weights made by others' code, or by their published formulas written out in loops.

Each function takes a weight (out, in) in fp32 and gives the tensors that a base would have for the
module ``m``, the quantiser's config, and the weight that they mean.
"""

from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from tests.checkpoint.codecs.compressed import GROUP, KINDS, Made


def fp8(weight: Tensor) -> Made:
    """Blocks of 16 by 16, each with a scale of its own."""
    out, in_ = weight.shape
    scales = torch.empty(-(-out // 16), -(-in_ // 16))
    stored, meant = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16)
            scales[i, j] = weight[part].abs().max() / 448
            stored[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[part] = stored[part].float() * scales[i, j]
    said = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    return {"m.weight": stored, "m.weight_scale_inv": scales}, said, meant


def fp8_whole(weight: Tensor) -> Made:
    """One scale for all of it, and one for activations."""
    scale = weight.abs().max() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {"m.weight": stored, "m.weight_scale_inv": scale, "m.activation_scale": scale * 2}
    said = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    return tensors, said, stored.float() * scale


def _four_bits(weight: Tensor, kind: str, nested: bool) -> Made:
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type=kind
    )
    tensors = {"m.weight": packed}
    tensors |= {f"m.weight.{name}": v for name, v in state.as_dict(packed=True).items()}
    meant = bnb.dequantize_4bit(packed, state)
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return tensors, said, meant.reshape(weight.shape)


def nf4(weight: Tensor) -> Made:
    """What bitsandbytes makes."""
    return _four_bits(weight, "nf4", nested=False)


def nf4_nested(weight: Tensor) -> Made:
    """The same, with its scales quantised too."""
    return _four_bits(weight, "nf4", nested=True)


def fp4(weight: Tensor) -> Made:
    """The same, with another table."""
    return _four_bits(weight, "fp4", nested=False)


def int8(weight: Tensor) -> Made:
    """Eight bits with a largest value for each row."""
    largest = weight.abs().amax(1)
    stored = (weight * 127 / largest[:, None]).round().to(torch.int8)
    meant = stored.float() * largest[:, None] / 127
    tensors = {"m.weight": stored, "m.SCB": largest, "m.weight_format": torch.tensor(0).byte()}
    return tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}, meant


def _grouped(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers (in, out), zeros and scales (groups, out) in fp16, and the weight that is meant."""
    x = weight.T.reshape(-1, GROUP, weight.shape[0])
    low, high = x.amin(1), x.amax(1)
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales.float()).round().clamp(1, 2**bits - 1)
    numbers = (x / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 2**bits - 1)
    meant = (numbers - zeros[:, None]) * scales.float()[:, None]
    shape = weight.T.shape
    return numbers.reshape(shape).long(), zeros.long(), scales, meant.reshape(shape).T.contiguous()


def _words(numbers: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """Numbers (rows, columns) packed along the columns, in an order within each word."""
    rows, columns = numbers.shape
    per = 32 // bits
    words = torch.zeros(rows, columns // per, dtype=torch.int64)
    for row in range(rows):
        for word in range(columns // per):
            value = 0
            for place, which in enumerate(order):
                value |= int(numbers[row, word * per + which]) << (bits * place)
            words[row, word] = value - 2**32 if value >= 2**31 else value
    return words.int()


def gptq(weight: Tensor, bits: int = 4, shuffled: bool = False, version: str = "gptq") -> Made:
    """AutoGPTQ's layout: packed along the inputs, zeros less one, groups in any order."""
    inputs = weight.shape[1]
    order = torch.randperm(inputs, generator=torch.manual_seed(2)) if shuffled else None
    sorted_ = weight if order is None else weight[:, order]
    numbers, zeros, scales, meant = _grouped(sorted_, bits)
    groups = torch.arange(inputs) // GROUP
    if order is not None:
        back = order.argsort()
        numbers, meant, groups = numbers[back], meant[:, back].contiguous(), groups[back]
    straight = tuple(range(32 // bits))
    tensors = {
        "m.qweight": _words(numbers.T, bits, straight).T.contiguous(),
        "m.qzeros": _words(zeros - int(version == "gptq"), bits, straight),
        "m.scales": scales,
        "m.g_idx": groups.int(),
    }
    said = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version}
    return tensors, said, meant


def gptq_shuffled(weight: Tensor) -> Made:
    """Groups as `desc_act` makes them."""
    return gptq(weight, shuffled=True)


def gptq_eight(weight: Tensor) -> Made:
    """Eight bits."""
    return gptq(weight, bits=8)


def gptq_v2(weight: Tensor) -> Made:
    """Zeros that are what they mean."""
    return gptq(weight, version="gptq_v2")


def awq(weight: Tensor) -> Made:
    """AutoAWQ's layout "gemm": packed along the outputs, in its own order."""
    numbers, zeros, scales, meant = _grouped(weight, 4)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "m.qweight": _words(numbers, 4, order),
        "m.qzeros": _words(zeros, 4, order),
        "m.scales": scales,
    }
    said = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    return tensors, said, meant


ENCODERS: dict[str, Callable[[Tensor], Made]] = {
    each.__name__: each
    for each in (
        fp8,
        fp8_whole,
        nf4,
        nf4_nested,
        fp4,
        int8,
        gptq,
        gptq_shuffled,
        gptq_eight,
        gptq_v2,
        awq,
    )
} | KINDS
