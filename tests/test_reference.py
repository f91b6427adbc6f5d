"""The reference of the language is current, complete, and every example in it works."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

import peftsurgery as ps
from peftsurgery.anatomy import survey
from peftsurgery.language.kinds import KINDS
from peftsurgery.language.on_base import OnBase
from peftsurgery.language.rule_file import RuleFile
from peftsurgery.language.schema import Expect, Flat, Param, Ranks, Rule
from peftsurgery.language.selection import select
from peftsurgery.language.storage import STORES
from peftsurgery.language.where import Where
from tests.models.captured import captured
from tools import reference

TEXT = reference.PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml ?([\w ]*)\n(.*?)```", TEXT, re.DOTALL)
NAMES = [yaml.safe_load(text)["name"] for _, text in BLOCKS]


def test_the_generated_parts_are_current() -> None:
    """`python -m tools.reference` writes them."""
    assert reference.current(TEXT) == TEXT


def test_no_part_is_left_out() -> None:
    made = set(reference.PART.findall(TEXT))
    parts = {(name, argument) for _, name, argument, _ in made}
    schemas = {model.__name__ for model in (RuleFile, Rule, Param, Expect, Ranks, Flat, Where)}
    assert {argument for name, argument in parts if name == "keys"} == schemas
    assert {argument for name, argument in parts if name == "kind"} == set(KINDS)
    assert {name for name, _ in parts} == set(reference.PARTS)
    assert reference.OPERATOR_EXAMPLES.keys() == reference.shipped_operators().keys()
    assert reference.STORE_EXAMPLES.keys() == STORES.keys()


@pytest.mark.parametrize(("models", "text"), BLOCKS, ids=NAMES)
def test_an_example_is_a_rule_that_fits_and_is_applied(models: str, text: str) -> None:
    file = ps.parse_rules(text)
    assert str(ps.check_rules(file)).startswith(file.name)
    for name in models.split()[1:]:
        operated = ps.apply(captured(name), file)
        assert {match["rule"] for match in operated.report.matches} == {file.name}


def test_the_examples_have_every_key() -> None:
    """Of every mapping that a rule file may hold; and a rule of every kind."""
    found: dict[str, set[str]] = {}
    for _, text in BLOCKS:
        for model, keys in keys_of(RuleFile, yaml.safe_load(text)):
            found.setdefault(model.__name__, set()).update(keys)
    found["OnBase"] = found["RuleFile"]
    for model in (RuleFile, OnBase, Rule, Param, Expect, Ranks, Flat, Where):
        known = {field.alias or name for name, field in model.model_fields.items()}
        assert known - found[model.__name__] == set(), model
    kinds = {rule.kind.name for _, text in BLOCKS for rule in ps.parse_rules(text).rules}
    assert kinds == {*KINDS, "pattern"}


def keys_of(model: type, data: Any) -> Iterator[tuple[type, set[str]]]:
    """The mappings in a document, each with the part of the schema that it is of."""
    yield model, set(data)
    inner: dict[type, dict[str, type]] = {
        RuleFile: {"rules": Rule, "flat": Flat, "roles": Where},
        Rule: {"where": Where, "params": Param, "expect": Expect, "ranks": Ranks},
        Where: dict.fromkeys(("not", "all", "any", "feeds", "fed_by"), Where),
    }
    for key, value in data.items():
        below = inner.get(model, {}).get(key)
        if below is not None and not isinstance(value, int):
            named = key in ("params", "roles")
            parts = value if isinstance(value, list) else value.values() if named else [value]
            for part in parts:
                yield from keys_of(below, part)


def test_a_clause_of_the_page_keeps_some_sites_and_drops_others() -> None:
    (text,) = (text for models, text in BLOCKS if models == "clauses")
    sites = survey(captured("llama").base_capture)
    cut = frozenset({"model.layers.0.self_attn.q_proj"})
    for rule in ps.parse_rules(text).rules:
        chosen = select(sites, rule, matched={"low_rank": cut})
        assert chosen.kept, rule.where
        assert chosen.dropped, rule.where


def test_the_facts_of_the_page_are_those_of_the_sites() -> None:
    """As they are found in models that have every kind."""
    found: dict[str, set[str]] = {name: set() for name in KINDS}
    for name in ("llama", "vit", "qwen2_moe"):
        for site in survey(captured(name).base_capture):
            plain = {f for f, v in site.facts.items() if isinstance(v, bool | int | float | str)}
            found[site.kind] |= plain - KINDS[site.kind].names - {"width", "role", "tower"}
    for name, facts in reference.FACTS.items():
        assert set(facts) == found[name], name
