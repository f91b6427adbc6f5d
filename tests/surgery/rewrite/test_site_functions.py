"""What a site lets a rule call: its own nodes, run again with other values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftsurgery as ps
from tests.models.captured import captured
from tests.models.zoo import ZOO

CORES = ["llama", "gpt2", "bert", "gpt_neox", "bloom", "gemma2", "t5"]
SDPA = torch.ops.aten.scaled_dot_product_attention.default
NAMES = ("outer", "inner")
UNCHANGED = """
name: unchanged
rules:
  - match: attention
    rewrite: attention(q, k, v, mask)
"""
TWICE = """
name: twice
rules:
  - match: residual
    rewrite: norm(x + h) - x
"""
PREFIX = """
name: prefix
with: {length: 3}
rules:
  - match: attention
    where: {kind: self}
    params:
      K: {shape: [length, kv_heads, head_dim], init: normal(0.5)}
      V: {shape: [length, kv_heads, head_dim], init: normal(0.5)}
    rewrite: attention(q, concat(tokens(K), k), concat(tokens(V), v), extend(mask, length))
"""


@pytest.mark.parametrize("name", CORES)
def test_a_core_run_again_with_its_own_values_is_the_core_and_replaces_it(name: str) -> None:
    graph, inputs = captured(name), ZOO[name].inputs(3, 9)
    again = ps.apply(graph, ps.parse_rules(UNCHANGED))
    with torch.no_grad():  # a bias that is trained chooses another kernel
        assert torch.equal(again(**inputs)[0], graph(**inputs)[0])
    for path, programs in again.captures[0].programs.items():
        ours, theirs = programs[0].graph, graph.base_capture.programs[path][0].graph
        cores = [len(g.find_nodes(op="call_function", target=SDPA)) for g in (ours, theirs)]
        assert cores[0] == cores[1], "the core that was replaced must not run"


@pytest.mark.parametrize("name", CORES)
def test_two_prefixes_are_one_longer_prefix(name: str) -> None:
    graph, inputs = captured(name), ZOO[name].inputs(3, 9)
    rules = ps.parse_rules(PREFIX)
    both = ps.apply(ps.apply(graph, rules, "inner", length=2), rules, "outer", length=3)
    one = ps.apply(graph, rules, "one", length=5)
    with torch.no_grad():
        for full, value in one.learnt().items():
            parts = [both.get_parameter(full.replace(".one.", f".{n}.")) for n in NAMES]
            value.copy_(torch.cat(parts))
        assert not torch.equal(one(**inputs)[0], graph(**inputs)[0])
        torch.testing.assert_close(both(**inputs)[0], one(**inputs)[0], rtol=0, atol=1e-6)


def test_the_norm_of_a_post_norm_model_is_the_one_after_the_sum() -> None:
    model, inputs = ZOO["bert"].build(), ZOO["bert"].inputs(3, 9)
    twice = ps.apply(captured("bert"), ps.parse_rules(TWICE))
    for name, part in model.named_modules():
        if name.endswith("output.LayerNorm"):
            part.register_forward_hook(lambda norm, _, result: norm.forward(result))
    torch.testing.assert_close(twice(**inputs)[0], model(**inputs)[0], rtol=0, atol=1e-6)


def test_no_norm_follows_the_sum_of_a_pre_norm_model() -> None:
    inputs = ZOO["llama"].inputs(3, 9)
    rules = ps.parse_rules(TWICE)
    result = ps.apply(captured("llama"), rules)(**inputs)[0]
    torch.testing.assert_close(result, captured("llama")(**inputs)[0], rtol=0, atol=1e-5)


class Causal(nn.Module):
    """Attention that torch is told to mask, two heads of four."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def heads(self, x: Tensor) -> list[Tensor]:
        split = (len(x), -1, 2, 4)
        return [part(x).view(split).transpose(1, 2) for part in (self.q, self.k, self.v)]

    def forward(self, x: Tensor) -> Tensor:
        core = F.scaled_dot_product_attention(*self.heads(x), is_causal=True)
        return self.o(core.transpose(1, 2).flatten(2))


def test_a_prefix_is_seen_where_causality_has_no_mask() -> None:
    torch.manual_seed(0)
    model, x = Causal().eval(), torch.randn(3, 6, 8)
    graph = ps.capture(model, inputs={"x": torch.randn(2, 5, 8)})
    operated = ps.apply(graph, ps.parse_rules(PREFIX))
    names = operated.cuts[0].parameters
    q, *rest = model.heads(x)
    prefixes = [
        operated.get_parameter(names[p]).transpose(0, 1).expand(3, -1, -1, -1) for p in "KV"
    ]
    k, v = (torch.cat(pair, 2) for pair in zip(prefixes, rest, strict=True))
    mask = torch.cat((torch.ones(6, 3), torch.ones(6, 6).tril()), 1).bool()
    core = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    wanted = model.o(core.transpose(1, 2).flatten(2))
    torch.testing.assert_close(operated(x=x), wanted, rtol=0, atol=1e-6)


class ByHand(Causal):
    """The same, spelled out: keys turned when they are split, later ones filled away."""

    def forward(self, x: Tensor) -> Tensor:
        split = (len(x), -1, 2, 4)
        q, v = (part(x).view(split).transpose(1, 2) for part in (self.q, self.v))
        k = self.k(x).view(split).permute(0, 2, 3, 1)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = torch.matmul(q, k) * 0.5
        weights = torch.softmax(scores.masked_fill(later, float("-inf")), -1)
        return self.o(torch.matmul(weights, v).transpose(1, 2).flatten(2))


def test_keys_that_are_turned_and_masks_that_hide() -> None:
    torch.manual_seed(0)
    model, x = ByHand().eval(), torch.randn(3, 6, 8)
    spelled = ps.capture(model, inputs={"x": torch.randn(2, 5, 8)})
    single = Causal().eval()
    single.load_state_dict(model.state_dict())
    fused = ps.capture(single, inputs={"x": torch.randn(2, 5, 8)})
    pair = [ps.apply(graph, ps.parse_rules(PREFIX)) for graph in (spelled, fused)]
    with torch.no_grad():
        for mine, theirs in zip(*(model.learnt().values() for model in pair), strict=True):
            mine.copy_(theirs)
    torch.testing.assert_close(pair[0](x=x), pair[1](x=x), rtol=0, atol=1e-6)
    assert not torch.equal(pair[0](x=x), spelled(x=x))


def test_keys_positions_are_not_lengthened_alone() -> None:
    """A bias of distances for keys that are not there."""
    with pytest.raises(ps.SurgeryError) as caught:
        ps.apply(captured("t5"), "prefix_tuning", attention=["cross"], shift=True)
    assert caught.value.code == "PSG331"


@pytest.mark.parametrize("name", ["deberta", "falcon_40b"])
def test_a_core_that_takes_keys_apart_or_holds_them_repeated_is_refused(name: str) -> None:
    with pytest.raises(ps.SurgeryError) as caught:
        ps.apply(captured(name), ps.parse_rules(PREFIX))
    assert caught.value.code == "PSG320"
