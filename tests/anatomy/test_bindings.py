"""What a site binds is what it says: the values of a real run satisfy the site's equation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from peftsurgery.anatomy import Placed, survey
from peftsurgery.capture import Block, GraphModel
from tests.models.captured import captured
from tests.models.zoo import ZOO

NAMES = (
    "bert",
    "gpt2",
    "phi3",
    "gemma2",
    "falcon_40b",
    "falcon_1b",
    "gpt_neox",
    "bloom",
    "t5",
    "transformer_encoder",
    "functional",
    "two_lists",
    "resnet",
)
Values = dict[tuple[str, fx.Node], Any]


class Recorder(fx.Interpreter):
    """Runs a program node by node, and the blocks it calls, and keeps every value."""

    def __init__(self, module: nn.Module, graph: fx.Graph, path: str, values: Values) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.path, self.values = path, values

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.values[self.path, n] = result.clone() if isinstance(result, Tensor) else result
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        block = self.module.get_submodule(target)
        assert isinstance(block, Block)
        path = f"{self.path}.{target}" if self.path else target
        graph = block.program(kwargs["program"]).graph
        return Recorder(block, graph, path, self.values).run(*args)


def run(name: str) -> tuple[GraphModel, Values]:
    model, values = captured(name), Values()
    inputs = ZOO[name].inputs(3, 5)
    capture = model.captures[0]
    with torch.no_grad():
        Recorder(model, capture.top.graph, "", values).run(*(inputs[n] for n in capture.names))
    return model, values


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def check_linear(site: Placed, at: dict[str, Tensor]) -> None:
    weight = at["W"].T if "W" in site.site.turned else at["W"]
    bias, y = at.get("b", torch.zeros(len(weight))), at["y"]
    if site.slice is not None:
        weight, bias = site.slice.take(weight, 0), site.slice.take(bias, 0)
        y = site.slice.take(y, -1)
    assert tuple(weight.shape) == (site.facts["out"], site.facts["in"])
    assert y.shape[:-1] == at["x"].shape[:-1]
    close(y, at["x"] @ weight.T + bias)


def check_embedding(site: Placed, at: dict[str, Tensor]) -> None:
    close(at["y"], at["W"][at["x"]])


def check_residual(site: Placed, at: dict[str, Tensor]) -> None:
    if not site.facts["parallel"]:
        close(at["y"], at["x"] + at["h"])


def check_norm(site: Placed, at: dict[str, Tensor]) -> None:
    eps = site.facts["eps"]
    x, scale = at["x"], at.get("W", torch.ones(at["x"].shape[-1]))
    if site.facts["op"] == "layer_norm":
        mean, spread = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        bias = at.get("b", torch.zeros(()))
        close(at["y"], (x - mean) / (spread + eps).sqrt() * scale + bias)
    elif site.facts["op"] == "rms_norm":
        whitened = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        plain = torch.allclose(at["y"], whitened * scale, rtol=1e-4, atol=1e-5)
        assert plain or torch.allclose(at["y"], whitened * (1 + scale), rtol=1e-4, atol=1e-5)


def check_conv(site: Placed, at: dict[str, Tensor]) -> None:
    facts = site.facts
    settings = [facts[key] for key in ("stride", "padding", "dilation", "groups")]
    close(at["y"], torch.conv2d(at["x"], at["W"], at.get("b"), *settings))


def check_attention(site: Placed, at: dict[str, Tensor]) -> None:
    facts = site.facts
    assert at["q"].shape[-1] == facts["head_dim"]
    if at["q"].dim() == 4:
        assert at["q"].shape[1] == facts["heads"]
        tokens = at["k"].shape[-2]
        assert at["k"].shape[-1] == facts["head_dim"]
        assert at["v"].shape[-2] == tokens
    seen = at["o"].shape[-2]
    assert seen == at["q"].shape[-2]


CHECKS = {
    "linear": check_linear,
    "embedding": check_embedding,
    "residual": check_residual,
    "norm": check_norm,
    "conv": check_conv,
    "attention": check_attention,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_values_satisfy_the_equation_of_the_site(name: str) -> None:
    model, values = run(name)
    checked = 0
    for site in survey(model.captures[0]):
        if site.kind in CHECKS:
            at = {key: values[site.block, node] for key, node in site.site.nodes.items()}
            CHECKS[site.kind](site, at)
            checked += 1
    assert checked
