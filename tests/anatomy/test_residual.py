"""Where sublayers join the stream, against what is known of the models."""

from __future__ import annotations

import pytest

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
