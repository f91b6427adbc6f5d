"""Where the rules of a file cut, each knowing the ones before it."""

from __future__ import annotations

import peftsurgery as ps
from peftsurgery.language.settings import resolve_settings
from peftsurgery.surgery.plan.cut import Operation
from peftsurgery.surgery.plan.select import select_cuts
from tests.models.captured import captured


def operation(text: str, name: str = "one") -> Operation:
    file = ps.parse_rules(text)
    return Operation(file, resolve_settings(file), name)


FIRST = "name: t\nrules: [{match: linear, where: {role: attn.q}, rewrite: 2 * y}]"


def test_a_rule_is_told_by_its_number_where_there_are_several() -> None:
    two = FIRST.replace("]", ", {match: norm, rewrite: 2 * y}]", 1)
    capture = captured("llama").base_capture
    cuts, selections = select_cuts(capture, operation(two))
    assert [chosen.name for chosen in selections] == ["one.rules[0]", "one.rules[1]"]
    assert sum(len(chosen.kept) for chosen in selections) == len(cuts)
    assert [chosen.name for chosen in select_cuts(capture, operation(FIRST))[1]] == ["one"]


def test_a_rule_knows_where_the_ones_before_it_cut_by_both_of_their_names() -> None:
    capture = captured("llama").base_capture
    before, _ = select_cuts(capture, operation(FIRST))
    for name in ("one", "t"):
        rule = f"{{match: parameter, where: {{matched: {name}}}, train: true}}"
        found, _ = select_cuts(capture, operation(f"name: u\nrules: [{rule}]", "two"), before)
        assert [cut.placed.parameter for cut in found] == [
            f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)
        ]


def test_a_pattern_is_a_site_in_every_block_that_has_it() -> None:
    rule = "{match: {pattern: 'mul(silu(linear(x, G)), linear(x, U))'}, rewrite: 2 * y}"
    found, _ = select_cuts(captured("llama").base_capture, operation(f"name: u\nrules: [{rule}]"))
    assert [cut.placed.module for cut in found] == [f"model.layers.{i}.mlp" for i in (0, 1)]
    assert found[0].site is found[1].site
    assert found[1].weights == {
        "G": "model.layers.1.mlp.gate_proj.weight",
        "U": "model.layers.1.mlp.up_proj.weight",
    }
