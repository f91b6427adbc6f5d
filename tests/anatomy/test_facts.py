"""Residual, embedding and parameter facts against what is known of the models."""

from __future__ import annotations

import pytest

from peftsurgery.anatomy import Placed, survey
from tests.models.captured import captured
from tests.models.zoo import ZOO


def sites(name: str, kind: str) -> list[Placed]:
    return [site for site in survey(captured(name).captures[0]) if site.kind == kind]


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


@pytest.mark.parametrize("name", ["bert", "gpt2", "falcon_1b", "bloom", "bart", "resnet", "swin"])
def test_the_biases_are_the_parameters_called_bias(name: str) -> None:
    model = ZOO[name].build()
    found = {site.parameter for site in sites(name, "parameter") if site.facts["kind"] == "bias"}
    called = {n for n, _ in model.named_parameters() if n.rpartition(".")[2] == "bias"}
    assert found == called


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "mixtral", "functional", "vit"])
def test_every_parameter_that_is_used_is_a_site(name: str) -> None:
    found = {site.parameter for site in sites(name, "parameter")}
    names = {n for n, _ in ZOO[name].build().named_parameters()}
    assert names <= found


@pytest.mark.parametrize(
    ("name", "setting"),
    [("bert", "layer_norm_eps"), ("phi3", "rms_norm_eps"), ("gpt2", "layer_norm_epsilon")],
)
def test_the_eps_of_a_norm_is_that_of_the_config(name: str, setting: str) -> None:
    expected = getattr(captured(name).config, setting)
    assert {site.facts["eps"] for site in sites(name, "norm")} == {expected}


def test_the_table_of_tokens_feeds_the_norm_behind_it_alone() -> None:
    (tokens,) = (site for site in sites("bert", "embedding") if site.role == "embed.tokens")
    assert [site.module for site in tokens.feeds] == ["bert.embeddings.LayerNorm"]


def test_up_feeds_down_and_queries_feed_their_core() -> None:
    linears = {site.module: site for site in sites("llama", "linear")}
    up = linears["model.layers.1.mlp.up_proj"]
    assert [site.module for site in up.feeds] == ["model.layers.1.mlp.down_proj"]
    query = linears["model.layers.0.self_attn.q_proj"]
    assert [site.kind for site in query.feeds] == ["attention", "linear"]
    down = linears["model.layers.0.mlp.down_proj"]
    assert {site.role for site in down.fed_by} == {"ffn.gate", "ffn.up"}
