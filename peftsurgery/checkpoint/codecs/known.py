"""The codecs that are known, by what a config calls their quantiser."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from peftsurgery.checkpoint.codecs.bitsandbytes import FP4, INT8, NF4
from peftsurgery.checkpoint.codecs.codec import Codec
from peftsurgery.checkpoint.codecs.compressed_floats import FLOAT4, FLOAT4_POWERS, FLOAT8
from peftsurgery.checkpoint.codecs.compressed_ints import PACKED_INTS, PLAIN_INTS
from peftsurgery.checkpoint.codecs.fp8_blocks import FP8_BLOCKS
from peftsurgery.checkpoint.codecs.mxfp4 import MXFP4
from peftsurgery.checkpoint.codecs.packed import AWQ, GPTQ

CODECS: Mapping[str, tuple[Codec, ...]] = MappingProxyType(
    {
        "fp8": (FP8_BLOCKS,),
        "gptq": (GPTQ,),
        "awq": (AWQ,),
        "mxfp4": (MXFP4,),
        "bitsandbytes": (NF4, FP4, INT8),
        "compressed-tensors": (PACKED_INTS, PLAIN_INTS, FLOAT8, FLOAT4, FLOAT4_POWERS),
    }
)
