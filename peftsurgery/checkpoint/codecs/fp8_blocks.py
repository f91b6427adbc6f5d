"""FP8 with a scale for each block of the weight, as DeepSeek-V3 is stored.

    weight (out, in) in e4m3, weight_scale_inv (out / 128, in / 128) in fp32:
    W[i, j] = weight[i, j] * weight_scale_inv[i // 128, j // 128]

DeepSeek-AI, 2024, arXiv:2412.19437, section 3.3.2; the name of the scale is the reciprocal's.
"""

from __future__ import annotations

import numpy as np

from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.codecs.codec import Codec, Parts, Said


def _decode(parts: Parts, said: Said) -> Array:
    weight, scale = parts["weight"], parts["scale"].astype(np.float32)
    rows, columns = said.get("weight_block_size") or (128, 128)
    out, in_ = weight.shape
    spread = np.repeat(np.repeat(scale, rows, axis=0)[:out], columns, axis=1)[:, :in_]
    return weight.astype(np.float32) * spread


FP8_BLOCKS = Codec(
    "fp8",
    {"weight": "weight", "scale": "weight_scale_inv"},
    lambda parts, said: (parts["weight"].shape[0], parts["weight"].shape[1]),
    _decode,
)
