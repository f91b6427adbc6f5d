"""The product of an experts site, with other rows or other matrices going in.

The site's own nodes run again, in its own dtype: those that pick or transpose matrices, and the
product with the grouping that it has. Matrices of a low rank are narrower than some kernels take
(torch's grouped product reads rows of 16 bytes), so they are filled up with zeros there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function_unary

from peftsurgery.anatomy.ops import meaning
from peftsurgery.anatomy.site import ATEN, Site
from peftsurgery.anatomy.values import value
from peftsurgery.surgery.rewrite.dtypes import cast
from peftsurgery.surgery.rewrite.layout import as_held, as_seen
from peftsurgery.surgery.rewrite.rerun import find_region

BYTES = 16  # a row of what torch's grouped product reads is a multiple of it


def expert_product(
    site: Site, x: Any, W: Any, outside: Callable[[fx.Node], Any], dtype: torch.dtype
) -> Any:
    """The site's product of rows x and matrices W (experts, out, in), which are in ``dtype``.

    ``outside`` gives the values of the program's other nodes: tensors, fake ones or proxies.
    """
    wanted, nodes = ATEN.sym_size.int(W, -2), site.nodes
    given = {nodes[name]: _held(site, name, part, dtype) for name, part in (("x", x), ("W", W))}
    region, values = find_region(list(given), nodes["product"]), dict(given)
    for node in region.nodes:
        bare = _without_bias(node, values)
        values[node] = region.step(node, values, outside) if bare is None else bare
    result = as_seen(site, "y", values[region.end])
    if _reads_rows(site):
        result = ATEN.slice.Tensor(result, -1, 0, wanted)
    return cast(result, value(nodes["product"]).dtype, dtype)


def _without_bias(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """The product that a node adds a bias to, by itself; None if it adds none."""
    known = meaning(node)
    if len(known.operands) < 3 or len(node.args) <= max(known.operands):
        return None
    multiply: Any = ATEN.matmul.default if known.turned else node.target
    factors: list[Any] = [node.args[i] for i in known.operands[:2]]
    return multiply(*map(values.__getitem__, factors))


def _held(site: Site, name: str, given: Any, dtype: torch.dtype) -> Any:
    """Convert x or W to what the model's own product takes."""
    own = value(site.nodes[name]).dtype
    found = cast(given, dtype, own)
    if _reads_rows(site):
        found = filled(found, 2 if name == "W" else 1, BYTES // own.itemsize)
    return as_held(site, name, found)


def _reads_rows(site: Site) -> bool:
    """Whether the product takes only rows of certain sizes."""
    return site.facts["op"] == "_grouped_mm"


def filled(given: Tensor, dims: int, multiple: int) -> Tensor:
    """A tensor whose last ``dims`` sizes are multiples, with zeros behind; itself if they are."""
    if has_torch_function_unary(given):  # a proxy: one node of the graph
        filling: Tensor = handle_torch_function(filled, (given,), given, dims, multiple)
        return filling
    more = [-size % multiple for size in reversed(given.shape[-dims:])]
    pads = [pad for size in more for pad in (0, size)]
    return torch.nn.functional.pad(given, pads) if any(more) else given
