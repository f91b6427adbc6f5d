"""The layout in which rules see the values of a site.

Weights of linears are (out, in), also where the model holds them turned, or with the axes of a
convolution's single tap; their values are (..., features), also where places come behind, and so
are those of residual streams.
At an attention site q and o are (batch, heads, tokens, head_dim), k and v are (batch, kv_heads,
tokens, head_dim), also where the model holds heads and batch in one dimension or keys, or values
and what is made of them, transposed.
"""

from __future__ import annotations

from typing import Any

import torch

from peftsurgery.anatomy.site import ATEN, Site
from peftsurgery.anatomy.values import sizes

POINTWISE = ("x", "W", "y")
STREAM = ("h", "x", "y", "normed")
HEADS = {"q": "heads", "o": "heads", "k": "kv_heads", "v": "kv_heads"}


def as_seen(site: Site, name: str, value: Any) -> Any:
    """Convert a site's value from the model's layout to the rules'."""
    if name in POINTWISE and "pointwise" in site.facts:
        return ATEN.flatten.using_ints(value, 1) if name == "W" else ATEN.movedim.int(value, 1, -1)
    if _is_image(site, name):
        return ATEN.movedim.int(value, site.facts["features"], -1)
    if _is_laid_out(site, name) and len(sizes(site.nodes[name])) == 3:
        value = ATEN.unflatten.int(value, 0, [-1, site.facts[HEADS[name]]])
    return ATEN.transpose.int(value, -1, -2) if name in site.turned else value


def as_held(site: Site, name: str, value: Any) -> Any:
    """Convert a value from the rules' layout to the model's: the inverse of :func:`as_seen`."""
    if name in POINTWISE and "pointwise" in site.facts:
        taps = [site.facts["in"], *[1] * site.facts["pointwise"]]
        return ATEN.unflatten.int(value, 1, taps) if name == "W" else ATEN.movedim.int(value, -1, 1)
    if _is_image(site, name):
        return ATEN.movedim.int(value, -1, site.facts["features"])
    value = ATEN.transpose.int(value, -1, -2) if name in site.turned else value
    if _is_laid_out(site, name) and len(sizes(site.nodes[name])) == 3:
        value = ATEN.flatten.using_ints(value, 0, 1)
    return value


def tokens_dim(site: Site, name: str) -> int:
    """The dimension of tokens in a value of the site, as the model has it."""
    return -1 if name in site.turned else -2


def is_regular(site: Site) -> bool:
    """Whether the site's values have the layouts that :func:`as_seen` knows."""
    batch = _rows(site, "q") // max(site.facts["heads"], 1)
    return all(
        len(sizes(site.nodes[name])) in (3, 4)
        and _rows(site, name) == batch * site.facts[HEADS[name]]
        for name in HEADS
    )


def _rows(site: Site, name: str) -> int:
    """Batch times heads, in the capture's example."""
    found = sizes(site.nodes[name])
    return found[0] if len(found) == 3 else found[0] * found[1]


def _is_laid_out(site: Site, name: str) -> bool:
    return site.kind == "attention" and name in HEADS


def _is_image(site: Site, name: str) -> bool:
    return site.kind == "residual" and name in STREAM and site.facts["features"] != -1


def orient(value: Any, site: Site, name: str) -> Any:
    """Convert a stored weight to the rules' form: (out, in), the slice alone."""
    value = as_seen(site, name, value)
    return value if site.slice is None else site.slice.take(value, 0)


def disorient(whole: Any, site: Site, name: str, value: Any) -> Any:
    """Write a weight in the rules' form back into the stored weight ``whole``."""
    if site.slice is not None:
        value = site.slice.put(as_seen(site, name, whole), 0, value)
    return as_held(site, name, value)


def wide(value: torch.Tensor) -> torch.Tensor:
    """Cast a weight to the dtype in which updates are added: at least fp32."""
    return value.to(wide_dtype(value.dtype))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that weights in ``dtype`` are added in."""
    return torch.promote_types(dtype, torch.float32)
