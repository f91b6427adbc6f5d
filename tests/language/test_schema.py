"""The schema: the short forms that a file may use, and what a rule says of itself."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

import peftsurgery as ps
from peftsurgery.language.rule_file import json_schema
from peftsurgery.language.schema import Rule
from peftsurgery.language.shipped import shipped


@pytest.mark.parametrize(
    ("match", "result"), [("linear", "y"), ("attention", "o"), ("residual", "h"), ("norm", "y")]
)
def test_a_text_alone_is_the_result_the_weight_and_a_sum(match: str, result: str) -> None:
    weight = {"fold": "W", "penalty": "2"} if match in ("linear", "norm") else {}
    rule = Rule(match=match, rewrite=result, **weight)
    assert set(rule.rewrite) == {result}
    assert set(rule.fold) == set(rule.penalty and {"W"})
    assert set(rule.penalty) == ({"sum"} if weight else set())


def test_a_number_alone_is_how_many_sites_exactly() -> None:
    assert Rule(match="linear", rewrite="y", expect=3).expect.exactly == 3
    assert Rule(match="linear", rewrite="y").expect.at_least == 1


def test_what_a_rule_reads_is_followed_through_its_names() -> None:
    rule = Rule(
        match="linear",
        let={"low": "linear(x, A)", "unread": "b * 2"},
        params={"A": {"shape": ["out", "in"]}},
        rewrite="y + low",
    )
    assert rule.reads() == {"y", "low", "x", "A"}


def test_a_rule_applies_where_its_condition_holds() -> None:
    rule = Rule(match="linear", rewrite="y", when="rank > 4")
    assert [rank for rank in (2, 4, 8) if rule.applies({"rank": rank})] == [8]
    assert Rule(match="linear", rewrite="y").applies({})


def test_a_file_says_which_config_is_its_own() -> None:
    file = ps.parse_rules("""
name: t
with: {rank: 4, precise: false}
rules:
  - match: linear
    params: {A: {shape: [out, in]}}
    rewrite: y + linear(x, A)
    checkpoint: {peft: {A: lora_A, modules: target_modules}}
checkpoint: {peft: {peft_type: LORA, r: rank, with: {precise: true}}}
""")
    assert file.identifying("peft") == {"peft_type": "LORA"}
    assert file.carried("peft") == {"r": "rank"}
    assert file.implied("peft") == {"precise": True}
    assert file.rules[0].suffixes("peft") == {"A": "lora_A"}
    assert file.rules[0].listing("peft") == "target_modules"
    assert file.identifying("other") == file.carried("other") == {}


def fits(schema: dict[str, Any], value: Any, whole: dict[str, Any]) -> bool:
    """Whether a value has the keys that a JSON schema names, as an editor would say."""
    if "$ref" in schema:
        return fits(whole["$defs"][schema["$ref"].rpartition("/")[2]], value, whole)
    if "anyOf" in schema and not any(fits(one, value, whole) for one in schema["anyOf"]):
        return False
    if isinstance(value, dict) and not set(schema.get("required", ())) <= value.keys():
        return False
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        return set(value) <= set(known) and all(fits(known[k], v, whole) for k, v in value.items())
    if isinstance(value, list) and "items" in schema:
        return all(fits(schema["items"], one, whole) for one in value)
    return True


@pytest.mark.parametrize("name", shipped())
def test_the_printed_schema_takes_every_shipped_rule(name: str) -> None:
    schema = json_schema()
    data = yaml.safe_load(shipped()[name].read_text(encoding="utf-8"))
    assert fits(schema, data, schema)
    assert not fits(schema, {**data, "unknown": 1}, schema)
    assert not fits(schema, {"name": name}, schema), "neither rules nor a base"
