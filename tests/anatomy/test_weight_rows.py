"""Rows of a parameter that views lead to, against the rows of a table of numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import peftsurgery as ps
from peftsurgery.anatomy.site import Slice
from peftsurgery.anatomy.weight_rows import part_of


class Reading(nn.Module):
    """A view of a parameter, as it is returned."""

    def __init__(self, view: Callable[[Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.view = view
        self.W = nn.Parameter(torch.arange(float(torch.Size(shape).numel())).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.view(self.W) + 0 * x.sum()


def viewed(view: Callable[[Tensor], Tensor], *shape: int) -> tuple[fx.Node, Tensor]:
    """The node of a view in an exported graph, and its value."""
    module = Reading(view, *shape)
    exported = torch.export.export(module, (torch.zeros(1),), strict=False)
    graph = exported.module(check_guards=False).graph
    weight = next(node for node in graph.nodes if node.op == "get_attr")
    added = next(node for node in graph.nodes if "add" in str(node.target))
    weight.meta.setdefault("val", module.W)
    node = added.args[0]
    assert isinstance(node, fx.Node)
    return node, view(module.W).detach()


VIEWS: list[tuple[Callable[[Tensor], Tensor], tuple[int, ...], int, Slice | None, bool]] = [
    (lambda W: W[4:10], (12, 5), 0, Slice(4, 6, 12), False),
    (lambda W: W.chunk(3)[1], (12, 5), 0, Slice(4, 4, 12), False),
    (lambda W: W.split([2, 10])[1], (12, 5), 0, Slice(2, 10, 12), False),
    (lambda W: W.narrow(0, 3, 2), (12, 5), 0, Slice(3, 2, 12), False),
    (lambda W: W[2:][1:4], (12, 5), 0, Slice(3, 3, 12), False),
    (lambda W: W.T[:, 3:6], (12, 5), 1, Slice(3, 3, 12), True),
    (lambda W: W[3:6].T, (12, 5), 1, Slice(3, 3, 12), True),
    (lambda W: W[:, 2:4], (5, 12), 1, Slice(2, 2, 12), False),
    (lambda W: W[:, 2:4].mT, (5, 12), 0, Slice(2, 2, 12), True),
    (lambda W: W.unflatten(0, (3, 4))[1], (12, 5), 0, Slice(4, 4, 12), False),
    (lambda W: W[::2], (12, 5), 0, Slice(0, 1, 2, 6), False),
    (lambda W: W[4:10], (12,), 0, Slice(4, 6, 12), False),
    (lambda W: W[4:10, 1:], (12, 5), 0, None, False),
    (lambda W: W[4:10].view(5, 6), (12, 5), 0, None, False),
    (lambda W: W[:, :3], (12, 5), 0, None, False),
    (lambda W: W[4:10] * 2, (12, 5), 0, None, False),
    (lambda W: W[4], (12, 5), 0, None, False),
    (lambda W: W.unsqueeze(0)[:, 4:10], (12, 5), 0, None, False),
]


@pytest.mark.parametrize(("view", "shape", "out", "rows", "flipped"), VIEWS)
def test_the_rows_of_a_view_are_told(
    view: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    out: int,
    rows: Slice | None,
    flipped: bool,
) -> None:
    node, _ = viewed(view, *shape)
    found = part_of(node, out)
    assert (found and (found.rows, found.flipped)) == (rows and (rows, flipped))


@settings(max_examples=15)
@given(st.data())
def test_a_part_is_what_the_view_has(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 9))
    start = data.draw(st.integers(0, size - 1))
    end = data.draw(st.integers(start + 1, size))
    turned = data.draw(st.booleans())
    shape = (3, size) if turned else (size, 3)

    def view(W: Tensor) -> Tensor:
        return W[:, start:end] if turned else W[start:end]

    node, value = viewed(view, *shape)
    found = part_of(node, int(turned))
    weight = torch.arange(3.0 * size).view(shape)
    assert found is not None
    assert found.rows.take(weight.mT if turned else weight, 0).equal(value.mT if turned else value)


class Halves(nn.Module):
    """Two products with parts of one matrix: one has a part of the bias, the other a whole one."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(12))
        self.c = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        one = nn.functional.linear(x, self.W[:6], self.b[:6])
        return one * nn.functional.linear(x, self.W[6:], self.c)


def test_a_part_with_the_bias_of_another_is_no_site() -> None:
    model = ps.capture(Halves().eval(), inputs={"x": torch.randn(2, 8)})
    found = [site for site in ps.sites(model) if site.kind == "linear"]
    assert [(site.slice, site.site.label) for site in found] == [(Slice(0, 6, 12), "0_6")]


class Scaled(nn.Module):
    """A whole matrix with some entries of a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.W, self.b[:6])


def test_a_bias_that_is_a_part_is_not_folded_as_if_there_were_none() -> None:
    model = ps.capture(Scaled().eval(), inputs={"x": torch.randn(2, 8)})
    rules = "name: times\nabout: a\nrules:\n  - match: linear\n    rewrite: %s\n    fold: %s"
    doubled = ps.apply(model, ps.parse_rules(rules % ("2 * y", "{W: 2 * W, b: 2 * b}")))
    with pytest.raises(ps.SurgeryError) as caught:
        ps.fold(doubled)
    assert caught.value.code == "PSG401"
    added = ps.apply(model, ps.parse_rules(rules % ("y + linear(x, W)", "2 * W")))
    x = torch.randn(3, 8)
    assert torch.allclose(ps.fold(added)(x), added(x), atol=1e-6)
