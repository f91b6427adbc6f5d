"""Prefixes done to the original model inside torch's attention call: an oracle without graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = {
    "bert_mlm": [f"bert.encoder.layer.{n}.attention" for n in range(2)],
    "llama": [f"model.layers.{n}.self_attn" for n in range(2)],
    "gpt2": [f"transformer.h.{n}.attn" for n in range(2)],
    "bart": [
        *(f"model.encoder.layers.{n}.self_attn" for n in range(2)),
        *(
            f"model.decoder.layers.{n}.{part}"
            for n in range(2)
            for part in ("self_attn", "encoder_attn")
        ),
    ],
}
"""The attention modules of a model, in the order in which they call torch."""

Prefix = Callable[[str], tuple[Tensor, Tensor]]
"""The keys and values before those of a module: (batch or 1, kv_heads, length, head_dim)."""


@contextmanager
def prefixed(paths: Sequence[str], prefix: Prefix, monkeypatch: Any) -> Iterator[None]:
    """Within the context the attention calls of one run see a prefix, in order of ``paths``."""
    plain, left = F.scaled_dot_product_attention, list(paths)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: bool = False, **more: Any
    ) -> Tensor:
        K, V = (_as(part, k) for part in prefix(left.pop(0)))
        if is_causal:
            attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        if attn_mask is not None:
            seen = 1 if attn_mask.dtype == torch.bool else 0
            attn_mask = F.pad(attn_mask, (K.shape[-2], 0), value=seen)
        keys, values = torch.cat((K, k), -2), torch.cat((V, v), -2)
        return plain(q, keys, values, attn_mask=attn_mask, **more)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        yield
    assert not left, "every attention module was called"


def _as(part: Tensor, keys: Tensor) -> Tensor:
    """A prefix for every row, repeated for the heads that share it."""
    whole = part.expand(keys.shape[0], -1, -1, -1)
    return whole.repeat_interleave(keys.shape[1] // whole.shape[1], 1)
