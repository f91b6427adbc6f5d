"""Where sublayers join the stream, against what is known of the models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.anatomy import survey
from tests.anatomy.found import sites


@pytest.mark.parametrize(
    ("name", "norm", "parallel", "after"),
    [
        ("bert", "post", False, ["attention", "ffn"]),
        ("llama", "pre", False, ["attention", "ffn"]),
        ("gpt2", "pre", False, ["attention", "ffn"]),
        ("mixtral", "pre", False, ["attention", "ffn"]),
        ("gpt_neox", "pre", True, ["attention", "ffn"]),
        ("falcon_7b", "pre", True, ["attention", "ffn"]),
        ("preceded", "pre", False, ["attention", "ffn"]),
    ],
)
def test_each_layer_joins_the_stream_after_each_sublayer(
    name: str, norm: str, parallel: bool, after: list[str]
) -> None:
    for layer in (0, 1):
        found = [site for site in sites(name, "residual") if site.layer == layer]
        assert sorted(str(site.facts["after"]) for site in found) == after
        assert {site.facts["norm"] for site in found} == {norm}
        assert {site.facts["parallel"] for site in found} == {parallel}


def test_a_decoder_layer_joins_three_times() -> None:
    found = [site for site in sites("bart", "residual") if ".decoder." in site.module]
    after = [site.facts["after"] for site in found]
    assert after == ["attention", "attention", "ffn"] * 2


def test_the_sum_in_the_caller_knows_what_kind_of_block_it_follows() -> None:
    found = [site.facts["after"] for site in sites("two_lists", "residual")]
    assert found == ["attention", "ffn"] * 2


class Streams(nn.Module):
    """Three streams of 8 features beside each other; sublayers read a mixture of them.

    What a sublayer makes is added to each stream, times a number of the stream's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.share = (nn.ModuleList(nn.Linear(24, 3) for _ in "ab") for _ in "ab")
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = (part(x)[:, None] for part in (self.q, self.k, self.v))
        y: Tensor = self.o(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return y

    def forward(self, x: Tensor) -> Tensor:
        sublayers = (self.attended, lambda y: self.down(F.gelu(self.up(y))))
        for mix, share, sublayer in zip(self.mix, self.share, sublayers, strict=True):
            weights = mix(x).sigmoid()[..., None]
            made = sublayer((weights * x.unflatten(-1, (3, 8))).mean(-2))
            x = x + (made.unsqueeze(-2) * share(x).sigmoid().unsqueeze(-1)).flatten(-2)
        return x


def test_sublayers_join_several_streams_at_once() -> None:
    graph = ps.capture(Streams(), {"x": torch.randn(2, 5, 24)})
    found = survey(graph.base_capture)
    joined = [site for site in found if site.kind == "residual"]
    assert [site.facts["after"] for site in joined] == ["attention", "ffn"]
    roles = {site.module: site.role for site in found if site.kind == "linear" and site.role}
    attention = {name: f"attn.{name}" for name in "qkvo"}
    assert roles == {**attention, "up": "ffn.up", "down": "ffn.down"}


class Weighed(nn.Module):
    """A stream and what sublayers make of it, each shifted and scaled by learnt numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.scale, self.shift = (nn.ParameterList(torch.rand(8) for _ in range(4)) for _ in "ab")

    def summed(self, x: Tensor, made: Tensor, number: int) -> Tensor:
        x = (x + self.shift[number]) * self.scale[number]
        return x + (made + self.shift[number + 1]) * self.scale[number + 1]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        q, k, v = (part(x)[:, None] for part in (self.q, self.k, self.v))
        x = self.summed(x, self.o(F.scaled_dot_product_attention(q, k, v)[:, 0]), 0)
        return self.summed(x, self.down(F.gelu(self.up(x))), 2)


def test_a_stream_may_be_weighed_before_it_is_joined() -> None:
    torch.manual_seed(0)
    model, x = Weighed(), torch.randn(2, 5, 8)
    graph = ps.capture(model, {"x": x})
    found = survey(graph.base_capture)
    joined = [site for site in found if site.kind == "residual"]
    assert [site.facts["after"] for site in joined] == ["attention", "ffn"]
    roles = {site.module: site.role for site in found if site.kind == "linear" and site.role}
    attention = {name: f"attn.{name}" for name in "qkvo"}
    assert roles == {**attention, "up": "ffn.up", "down": "ffn.down"}
    rule = """
name: without
about: Leaves out what a feed-forward makes.
rules: [{match: residual, where: {after: ffn}, rewrite: h - h}]
"""
    with torch.no_grad():
        actual = ps.apply(graph, ps.parse_rules(rule))(x)
        model.down.weight.zero_()
        model.down.bias.copy_(-model.shift[3])
        torch.testing.assert_close(actual, model(x))


class SideBySide(nn.Module):
    """Attention and a feed-forward of one normalised stream, added to it one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        seen = self.norm(x)
        q, k, v = (part(seen)[:, None] for part in (self.q, self.k, self.v))
        mixed = self.o(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + mixed + self.down(F.gelu(self.up(seen)))


@pytest.mark.parametrize("after", ["attention", "ffn"])
def test_sublayers_side_by_side_may_be_added_one_after_the_other(after: str) -> None:
    """As in Cohere's Command R and in StableLM with parallel residuals."""
    torch.manual_seed(0)
    model, x = SideBySide(), torch.randn(2, 5, 8)
    graph = ps.capture(model, {"x": x})
    found = survey(graph.base_capture)
    joined = [site for site in found if site.kind == "residual"]
    told = [(site.facts["after"], site.facts["parallel"], site.facts["norm"]) for site in joined]
    assert told == [("attention", True, "pre"), ("ffn", True, "pre")]
    roles = {site.module: site.role for site in found if site.kind == "linear"}
    attention = {name: f"attn.{name}" for name in "qkvo"}
    assert roles == {**attention, "up": "ffn.up", "down": "ffn.down"}
    rule = f"""
name: without
about: Leaves out what a sublayer makes.
rules: [{{match: residual, where: {{after: {after}}}, rewrite: h - h}}]
"""
    last = model.o if after == "attention" else model.down
    with torch.no_grad():
        actual = ps.apply(graph, ps.parse_rules(rule))(x)
        last.weight.zero_(), last.bias.zero_()
        torch.testing.assert_close(actual, model(x))
