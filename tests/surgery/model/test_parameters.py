"""Rules that rewrite parameters: what is made of a parameter is what all its readers see.

The oracle is the original in plain torch with the parameter replaced.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from tests.models.captured import captured
from tests.models.zoo import ZOO
from tests.surgery.reference import randomise


class Readers(nn.Module):
    """Parameters that are tied, read twice, read through views, and read by no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.gain, self.matrix = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.norm(x + self.first(x) * self.gain)
        y = y + torch.einsum("bti,ij->btj", y, self.matrix) + y @ self.matrix.T * self.matrix[0]
        result: Tensor = self.head(y + self.second(y).tanh())
        return result


IDS = torch.arange(15).reshape(3, 5) % 11


@cache
def readers() -> tuple[Readers, ps.GraphModel]:
    torch.manual_seed(0)
    module = Readers().eval().requires_grad_(False)
    return module, ps.capture(module, inputs=(IDS,))


def rule(path: str, extra: str = "", name: str = "scaled") -> Any:
    return ps.parse_rules(
        f"name: {name}\nrules:\n  - match: parameter\n    where: {{path: '{path}'}}\n{extra}"
        "    params: {g: {shape: [columns], init: ones}}\n"
        "    rewrite: W * g\n    fold: W * g\n"
    )


LOW_RANK = ps.parse_rules("""
name: low_rank
with: {rank: 2}
rules:
  - match: parameter
    where: {path: "matrix|first.weight|embed.weight"}
    params:
      A: {shape: [rank, columns], init: normal(1)}
      B: {shape: [rows, rank]}
    rewrite: W + B @ A
    fold: W + B @ A
""")


def replaced(operated: ps.OperatedModel) -> nn.Module:
    """The original with every matched parameter replaced by what the rule makes of it."""
    module = copy.deepcopy(readers()[0])
    module.head.weight = nn.Parameter(module.head.weight.clone(), requires_grad=False)
    for match in operated.report.matches:
        made = [operated.get_parameter(name).detach() for name in match["added"]]
        W = module.get_parameter(match["parameter"])
        W.copy_(W * made[0] if len(made) == 1 else W + made[1] @ made[0])
    return module


@pytest.mark.parametrize(
    "path",
    ["matrix", "gain", "norm.*", "first.*", "embed.weight", "head.weight", "(embed|head).*", ".*"],
)
def test_every_reader_of_a_parameter_sees_what_a_rule_makes_of_it(
    path: str, tmp_path: Path
) -> None:
    module, graph = readers()
    operated = randomise(ps.apply(graph, rule(path)), scale=0.3)
    expected = replaced(operated)(IDS)
    assert (expected - module(IDS)).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(operated(IDS), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(ps.fold(operated)(IDS), expected, atol=1e-6, rtol=1e-6)
        operated.save(tmp_path / "saved")
        assert torch.equal(ps.load(tmp_path / "saved", graph)(IDS), operated(IDS))
        assert torch.equal(ps.eject(operated)(IDS), module(IDS))


def test_a_low_rank_change_is_for_any_parameter() -> None:
    operated = randomise(ps.apply(readers()[1], LOW_RANK), scale=0.3)
    with torch.no_grad():
        expected = replaced(operated)(IDS)
        torch.testing.assert_close(operated(IDS), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(ps.fold(operated)(IDS), expected, atol=1e-6, rtol=1e-6)


def test_gradients_are_those_of_plain_torch() -> None:
    operated = randomise(ps.apply(readers()[1], rule("matrix")), scale=0.3)
    operated(IDS).square().sum().backward()
    module = copy.deepcopy(readers()[0])
    g = operated.get_parameter("scaled.matrix.g").detach().clone().requires_grad_()
    module_output = torch.func.functional_call(module, {"matrix": module.matrix * g}, (IDS,))
    module_output.square().sum().backward()
    grad = operated.get_parameter("scaled.matrix.g").grad
    torch.testing.assert_close(grad, g.grad)


def test_a_parameter_may_be_trained_and_rewritten_at_once() -> None:
    graph = readers()[1]
    operated = ps.apply(graph, rule("first.*|matrix", "    train: true\n"))
    randomise(operated, scale=0.3)
    assert {"first.weight", "first.bias", "matrix"} <= operated.learnt().keys()
    with torch.no_grad():
        module = copy.deepcopy(readers()[0])
        for match in operated.report.matches:
            W = module.get_parameter(match["parameter"])
            g = operated.get_parameter(match["added"][0])
            W.copy_(operated.get_parameter(match["parameter"]) * g)
        torch.testing.assert_close(operated(IDS), module(IDS))
        torch.testing.assert_close(ps.fold(operated)(IDS), module(IDS))
    operated(IDS).sum().backward()
    assert all(p.grad is not None for p in operated.parameters() if p.requires_grad)


LINEAR = {
    "branch": "params: {B: {shape: [out, in], init: zeros}}, rewrite: 'y + linear(x, B)', "
    "fold: W + B",
    "weight": "params: {B: {shape: [out, in], init: zeros}}, rewrite: {W: W * (1 + B)}, "
    "fold: W * (1 + B)",
    "input": "params: {s: {shape: [in], init: ones}}, rewrite: {x: x * s}, fold: W * s",
    "magnitude": "params: {m: {shape: [out], init: 'norm(W, 1)'}}, "
    "rewrite: 'linear(x, W, b) * (m / norm(W, 1))', "
    "fold: {W: 'W * (m / norm(W, 1))[:, None]', b: 'b * m / norm(W, 1)'}",
}


@pytest.mark.parametrize("one", ["parameter", *LINEAR])
@pytest.mark.parametrize("other", ["parameter", *LINEAR])
def test_what_two_rules_do_at_one_weight_folds_to_what_they_compute_in_any_order(
    one: str, other: str
) -> None:
    graph = readers()[1]
    files = {"parameter": rule("first.weight|matrix")} | {
        name: ps.parse_rules(
            f"name: {name}\nrules: [{{match: linear, where: {{path: first|second}}, {body}}}]"
        )
        for name, body in LINEAR.items()
    }
    operated = ps.apply(ps.apply(graph, files[one], name="one"), files[other], name="two")
    randomise(operated, scale=0.2)
    with torch.no_grad():
        torch.testing.assert_close(ps.fold(operated)(IDS), operated(IDS), atol=1e-5, rtol=1e-5)


def test_each_row_of_a_batch_has_its_own_parameters() -> None:
    graph = readers()[1]
    many: ps.OperatedModel = ps.apply(graph, rule("first.*|matrix"), name="a")
    many = ps.apply(many, rule("first.*|matrix"), name="b")
    many = ps.apply(many, rule("first.*|matrix", "    train: true\n"), name="c")
    many.deactivate("c")
    many = ps.apply(many, "bitfit", name="d")
    randomise(many, scale=0.3)
    names = ["a", "c", None, "b", "d", "a"]
    ids = torch.cat([IDS, IDS])
    with torch.no_grad():
        rows = many(ids, adapters=names)
        for number, name in enumerate(names):
            with many.only(*([name] if name else [])):
                torch.testing.assert_close(rows[number], many(ids)[number], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_parameters_of_blocks_are_rewritten_in_every_block(name: str) -> None:
    graph = captured(name)
    operated = randomise(ps.apply(graph, rule(r".*\.(1|0)\..*weight")), scale=0.2)
    module = ZOO[name].build().requires_grad_(False)
    for match in operated.report.matches:
        W = module.get_parameter(match["parameter"])
        W.mul_(operated.get_parameter(match["added"][0]).detach())
    with torch.no_grad():
        found = operated(**ZOO[name].inputs(3, 5))[0]
        torch.testing.assert_close(found, module(**ZOO[name].inputs(3, 5))[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["y", "x", "h"])
def test_every_value_of_a_residual_addition_can_be_rewritten(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Doubled by a rule: the sum, the stream where it is added, or the sublayer's output."""
    text = "name: t\nrules: [{match: residual, where: {layers: '0'}, rewrite: {%s: 2 * %s}}]"
    operated = ps.apply(captured("llama"), ps.parse_rules(text % (target, target)))
    module = ZOO["llama"].build().requires_grad_(False)
    layer, inputs = module.get_submodule("model.layers.0"), ZOO["llama"].inputs(3, 5)
    attention, norm, mlp, after = (
        layer.get_submodule(name)
        for name in ("self_attn", "input_layernorm", "mlp", "post_attention_layernorm")
    )
    twice = {name: 2.0 if name == target else 1.0 for name in "xhy"}

    def forward(x: Tensor, **rest: object) -> Tensor:
        h = attention(hidden_states=norm(x), **rest)[0]
        x = twice["y"] * (twice["x"] * x + twice["h"] * h)
        return twice["y"] * (twice["x"] * x + twice["h"] * mlp(after(x)))

    monkeypatch.setattr(layer, "forward", forward)
    with torch.no_grad():
        expected = module(**inputs)[0]
        torch.testing.assert_close(operated(**inputs)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("linear", "{x: x + sum(y)}"),
        ("residual", "h + y"),
        ("residual", "{x: x + y}"),
        ("attention", "{q: q + o}"),
        ("attention", "{x: x + token_mean(x) * sum(k)}"),
    ],
)
def test_a_value_is_not_rewritten_by_what_is_made_of_it(kind: str, body: str) -> None:
    with pytest.raises(ps.SurgeryError) as refusal:
        ps.parse_rules(f"name: t\nrules: [{{match: {kind}, rewrite: {body}}}]")
    assert refusal.value.code == "PSG113"


def test_queries_may_be_rewritten_by_keys_which_are_computed_later() -> None:
    rules = "name: t\nrules: [{match: attention, rewrite: {q: q + 0 * k, x: x}}]"
    operated = ps.apply(captured("bert"), ps.parse_rules(rules))
    inputs = ZOO["bert"].inputs(3, 5)
    with torch.no_grad():
        torch.testing.assert_close(operated(**inputs)[0], captured("bert")(**inputs)[0])
