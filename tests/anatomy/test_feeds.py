"""Which site takes in what another puts out, by the models' own code."""

from __future__ import annotations

from tests.anatomy.found import sites


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
