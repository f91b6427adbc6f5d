"""Cuts: the names of what they add, the order in which they are made, and adapters' names."""

from __future__ import annotations

from typing import Any

import pytest

import peftsurgery as ps
from peftsurgery.language.settings import resolve_settings
from peftsurgery.surgery.plan.cut import Cut, Operation, copy_name, in_order, is_adapter_name
from peftsurgery.surgery.plan.select import select_cuts
from tests.models.captured import captured

PARAMS = "params: {A: {shape: [2]}}, rewrite: 2 * "


def cuts(name: str, *rules: str) -> list[Cut]:
    file = ps.parse_rules(f"name: t\nrules: [{', '.join(rules)}]")
    operation = Operation(file, resolve_settings(file), "one")
    found, _ = select_cuts(captured(name).base_capture, operation)
    return found


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("match: linear, where: {role: attn.q}, " + PARAMS + "y", "attn.c_attn.one.q.A"),
        ("match: linear, where: {role: ffn.up}, " + PARAMS + "y", "mlp.c_fc.one.A"),
        ("match: residual, where: {after: ffn}, " + PARAMS + "h", "mlp.c_proj.one.ffn.A"),
        (
            "match: parameter, where: {kind: bias, path: '.*c_fc.*'}, params: {A: {shape: [2]}}, "
            "rewrite: {W: 2 * W}",
            "mlp.c_fc.one.bias.A",
        ),
    ],
    ids=["a part of a weight", "a whole one", "a sum", "a bias"],
)
def test_what_a_cut_adds_is_named_beneath_its_module(rule: str, expected: str) -> None:
    names = [cut.parameters["A"] for cut in cuts("gpt2", f"{{{rule}}}")]
    assert names == [f"transformer.h.{layer}.{expected}" for layer in (0, 1)]


@pytest.mark.parametrize(
    ("shared", "names"),
    [("true", {"one.A"}), ("layer % 2", {"one.0.A", "one.1.A"}), ("layer * 0", {"one.0.A"})],
)
def test_what_sites_share_is_named_by_the_adapter(shared: str, names: set[str]) -> None:
    rule = f"{{match: attention, params: {{A: {{shape: [2], shared: {shared}}}}}, rewrite: 2 * o}}"
    assert {cut.parameters["A"] for cut in cuts("gpt2", rule)} == names


def test_what_goes_into_a_site_is_changed_before_what_comes_out() -> None:
    where = "where: {role: ffn.up, layers: 0}"
    made = cuts(
        "llama",
        f"{{match: linear, {where}, rewrite: 2 * y}}",
        f"{{match: linear, {where}, rewrite: {{x: 2 * x}}}}",
        f"{{match: linear, {where}, rewrite: {{W: 2 * W}}}}",
        "{match: parameter, where: {path: '.*layers.0.*up_proj.weight'}, rewrite: {W: 2 * W}}",
    )
    assert [next(iter(cut.rule.rewrite)) for cut in in_order(made)] == ["W", "W", "x", "y"]
    assert in_order(made)[0].site.kind == "parameter"


def test_cuts_that_do_the_same_to_a_program_are_known_as_such() -> None:
    rule = "{match: linear, where: {role: ffn.*}, rewrite: 2 * y}"
    found = cuts("llama", rule)
    assert len({cut.placed.block for cut in found}) == 2
    assert len({cut.done for cut in found}) == len({cut.site for cut in found}) == 3


def test_sizes_are_those_of_the_site_and_weights_have_their_full_names() -> None:
    (cut,) = cuts("llama", "{match: linear, where: {role: attn.k, layers: 1}, rewrite: 2 * y}")
    assert cut.sizes == {"in": 32, "out": 16}
    assert cut.weights == {"W": "model.layers.1.self_attn.k_proj.weight"}


@pytest.mark.parametrize(
    ("name", "fits"),
    [("a", True), ("_a-1", True), ("", False), ("1a", False), ("a.b", False), (None, False)],
)
def test_an_adapter_s_name_can_be_part_of_a_parameter_s(name: Any, fits: bool) -> None:
    assert is_adapter_name(name) is fits


def test_a_copy_of_a_parameter_has_a_name_beneath_its_module() -> None:
    assert copy_name("model.norm.weight", "one") == "model.norm.one.weight"
