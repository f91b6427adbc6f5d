"""Regions run again: with the values that there were, with others, and with more keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.anatomy import Placed, survey
from peftsurgery.surgery.rewrite.rerun import core_region, find_region, padded

HEADS, WIDTH, LENGTH, MORE = 2, 8, 5, 3
Core = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Attending(nn.Module):
    """Attention over one text, whose core is given."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.slope = nn.Parameter(torch.randn(HEADS, 1, 1))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        parts = (self.heads(part(x)) for part in (self.q, self.k, self.v))
        return self.o(self.core(self, *parts).transpose(1, 2).flatten(2))


def fused(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def biased(module: Attending, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores with a bias of distance, later tokens hidden."""
    places = torch.arange(q.shape[2])
    distance = (places[None] - places[:, None]).abs()
    scores = q @ k.mT / 2 - module.slope * distance
    hidden = places[None] > places[:, None]
    return torch.softmax(scores.masked_fill(hidden, -1e9), -1) @ v


def capped(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(3 * torch.tanh(q @ k.mT / 3), -1) @ v


def numbered(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores raised to the power of the key's number: nothing is neutral there."""
    return torch.softmax((q @ k.mT).abs() ** torch.arange(k.shape[2]), -1) @ v


class Recorder(fx.Interpreter):
    """Runs a graph, and keeps every value."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph, garbage_collect_values=False)


def site_of(module: nn.Module) -> Placed:
    graph = ps.capture(module, {"x": torch.randn(2, LENGTH, WIDTH)})
    (site,) = (s for s in survey(graph.base_capture) if s.kind == "attention")
    return site


def values_of(module: nn.Module, site: Placed, x: Tensor) -> dict[fx.Node, Any]:
    recorder = Recorder(module, site.program.graph)
    recorder.run(x)
    return recorder.env


@pytest.mark.parametrize("core", [fused, biased, capped])
def test_a_core_run_again_gives_what_it_gave(core: Core) -> None:
    module = Attending(core)
    site, x = site_of(module), torch.randn(3, LENGTH + 1, WIDTH)
    values, nodes = values_of(module, site, x), site.site.nodes
    region = core_region(site.site)
    given = {nodes[name]: values[nodes[name]] for name in "qkv"}
    given |= {nodes["mask"]: values[nodes["mask"]]} if "mask" in nodes else {}
    if core is fused:
        region = find_region([nodes[name] for name in "qkv"], nodes["o"])
    found = region.run(given, values.__getitem__)
    torch.testing.assert_close(found, values[nodes["o"]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("core", [biased, capped])
def test_more_keys_on_the_left_are_seen_and_get_no_bias(core: Core) -> None:
    module = Attending(core)
    site, x = site_of(module), torch.randn(2, LENGTH, WIDTH)
    values, nodes = values_of(module, site, x), site.site.nodes
    q, k, v = (values[nodes[name]] for name in "qkv")
    more = [torch.randn(2, HEADS, MORE, WIDTH // HEADS) for _ in "kv"]
    keys, shown = (torch.cat(pair, 2) for pair in zip(more, (k, v), strict=True))
    given = {nodes["q"]: q, nodes["k"]: keys, nodes["v"]: shown}
    if "mask" in nodes:
        given[nodes["mask"]] = F.pad(values[nodes["mask"]], (MORE, 0))  # True hides, or adds 0
    found = core_region(site.site).run(given, values.__getitem__)
    if core is capped:
        expected = torch.softmax(3 * torch.tanh(q @ keys.mT / 3), -1) @ shown
    else:
        places = torch.arange(LENGTH)
        distance = (places[None] - places[:, None]).abs()
        scores = q @ keys.mT / 2 - F.pad(module.slope * distance, (MORE, 0))
        hidden = F.pad(places[None] > places[:, None], (MORE, 0))
        expected = torch.softmax(scores.masked_fill(hidden, -1e9), -1) @ shown
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_core_that_knows_its_keys_by_number_is_refused() -> None:
    with pytest.raises(ps.SurgeryError, match="PSG320"):
        core_region(site_of(Attending(numbered)).site)


def test_a_region_is_what_lies_between_and_no_more() -> None:
    def body(a: Tensor, b: Tensor) -> Tensor:
        first = a.sin()
        return first.cos() * b.exp() + first.tanh()

    class Body(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return body(a, b)

    graph = torch.export.export(Body(), (torch.randn(3), torch.randn(3))).graph
    by_name = {node.name: node for node in graph.nodes}
    region = find_region([by_name["cos"]], by_name["add"])
    assert [node.name for node in region.nodes] == ["mul", "add"]
    outside = {by_name["exp"]: torch.tensor(3.0), by_name["tanh"]: torch.tensor(5.0)}
    assert region.run({by_name["cos"]: torch.tensor(2.0)}, outside.__getitem__) == 11


@pytest.mark.parametrize("dim", [-1, -2])
def test_what_is_short_is_filled_on_the_left(dim: int) -> None:
    short, beside = torch.ones(2, 3, 3), torch.ones(2, 5, 5)
    found = padded(short, beside, dim, 7)
    assert found.shape[dim] == 5
    assert torch.equal(found.narrow(dim, 2, 3), short)
    assert (found.narrow(dim, 0, 2) == 7).all()
