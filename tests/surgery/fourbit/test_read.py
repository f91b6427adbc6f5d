"""A graph that reads a packed weight computes with the unpacked one, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from peftsurgery.language.storage import Storage
from peftsurgery.surgery.fourbit.pack import PackedWeight, pack, recipe_of, unpack
from peftsurgery.surgery.fourbit.read import multiplied, read_packed, unpacked

pytest.importorskip("bitsandbytes.functional")

READS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], object]] = {
    "linear": (F.linear, multiplied),
    "matmul": (lambda x, W: torch.ops.aten.matmul.default(x, W), multiplied),
    "another product": (lambda x, W: torch.einsum("bi,oi->bo", x, W), unpacked),
    "no product": (lambda x, W: x + W.sum(), unpacked),
}


class Reading(nn.Module):
    """Something that reads a weight."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.read, self.W = read, nn.Parameter(torch.randn(64, 64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x, self.W)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=str)
def test_what_is_read_is_the_unpacked_weight(read: str, compute: torch.dtype | None) -> None:
    body, reader = READS[read]
    module = Reading(body)
    recipe = recipe_of(Storage("nf4", 64, True, None), (64, 64), torch.float32, False)
    packed = pack(module.W, recipe)
    dense = unpack(packed, recipe)
    traced = torch.export.export(module, (torch.randn(3, 64),)).module(check_guards=False)
    assert isinstance(traced, fx.GraphModule)
    read_packed(traced.graph, {"W": PackedWeight(recipe, compute, "t")})
    assert [n.target for n in traced.graph.nodes if n.target in (multiplied, unpacked)] == [reader]
    traced.W = nn.Parameter(packed, requires_grad=False)
    traced.recompile()
    x = torch.randn(3, 64, requires_grad=True)
    rounded = compute is not None and reader is multiplied
    cast = compute if rounded and compute is not None else torch.float32
    expected = body(x.to(cast), dense.to(cast)).to(torch.float32)
    found = traced(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    wanted = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x), wanted, rtol=0, atol=1e-5)
