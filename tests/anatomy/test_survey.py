"""The sites of a whole model are those of its blocks, under the names that the original has."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftsurgery as ps
from peftsurgery.anatomy import Placed, survey
from peftsurgery.anatomy.survey import layer_index

HEADS = 2


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.into(x).chunk(3, -1)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.up, self.down = Mixer(), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])}) for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        for stage in self.stages:
            for layer in stage["layers"]:
                x = layer(x)
        return self.head(x)


@cache
def sites() -> list[Placed]:
    return list(survey(ps.capture(Model(), {"x": torch.randn(2, 4, 8)}).base_capture))


def test_a_weight_has_the_name_and_the_class_that_the_original_gives_it() -> None:
    model = Model()
    linears = [site for site in sites() if site.kind == "linear"]
    named = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert {site.module for site in linears} == named
    assert {site.parameter for site in linears} == {f"{name}.weight" for name in named}
    assert {site.type for site in linears} == {"Linear"}


def test_a_site_is_in_a_block_and_a_layer_index_the_outermost_list() -> None:
    for site in sites():
        parts = site.module.split(".")
        if parts[0] != "stages":
            assert (site.block, site.layer) == ("", None)
            continue
        assert site.module.startswith(site.block)
        assert site.layer == int(parts[1])
    lists = frozenset({"stages", "stages.0.layers"})
    assert layer_index("stages.1.layers.0.up", lists) == 1
    assert layer_index("head", lists) is None


def test_equal_blocks_share_their_sites() -> None:
    ups = [site for site in sites() if site.role == "ffn.up"]
    assert len(ups) == 4
    assert len({site.site for site in ups}) == 1


def test_the_parts_of_one_core_know_it_and_are_its_neighbours() -> None:
    for core in (site for site in sites() if site.kind == "attention"):
        mine = [s for s in sites() if s.attentions == core.attentions and s.kind == "linear"]
        assert {s.role for s in mine} == {*("attn.q", "attn.k", "attn.v", "attn.o", "attn.qkv")}
        assert all(s.module.startswith(core.module) for s in mine)
        (out,) = (s for s in mine if s.role == "attn.o")
        assert core in out.fed_by
        assert {s.role for s in core.fed_by} >= {"attn.q", "attn.k", "attn.v"}
        assert core.facts["heads"] == core.facts["kv_heads"] == HEADS


def test_the_head_is_known_in_the_top_graph_alone() -> None:
    heads = [site for site in sites() if site.role == "head" and site.kind == "linear"]
    assert [site.module for site in heads] == ["head"]
    trained = {s.parameter for s in sites() if s.kind == "parameter" and s.role == "head"}
    assert trained == {"head.weight", "head.bias"}
