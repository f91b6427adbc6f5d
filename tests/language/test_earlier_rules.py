"""Clauses about what came before: `matched`, settings that are null, and rules left out."""

import pytest

from peftsurgery.errors import SurgeryError
from peftsurgery.language.loading import parse_rules
from peftsurgery.language.selection import select
from tests.language.sites import decoder

TEXT = """
name: t
with: {only: null, who: [attn.q]}
rules:
  - {match: linear, where: {role: $who, matched: $only}, rewrite: y}
"""
CUT = {"first": frozenset({"model.layers.0.attn.q_proj", "model.layers.2.attn.q_proj"})}


def chosen(**settings):
    file = parse_rules(TEXT, "t.yaml")
    return select(decoder(), file.rules[0], {**file.with_, **settings}, name="t", matched=CUT)


def test_a_rule_can_be_kept_to_the_modules_that_another_cut():
    assert {site.module for site in chosen(only="first").kept} == CUT["first"]
    reasons = [reason for missed in chosen(only="first").dropped for reason in missed.reasons]
    assert "first did not cut 'model.layers.1.attn.q_proj'" in reasons


def test_a_clause_whose_setting_is_null_is_left_out():
    assert len(chosen().kept) == 4
    assert [text for text, _ in chosen().counts()] == ["linear sites", "role: attn.q"]


def test_a_rule_for_no_roles_is_left_out_and_expects_nothing():
    selection = chosen(who=[])
    assert not selection.kept
    selection.check()
    with pytest.raises(SurgeryError) as error:
        chosen(who=["attn.o"], only="first").check()
    assert error.value.code == "PSG301"


def test_a_rule_that_was_not_applied_before_is_named():
    with pytest.raises(SurgeryError) as error:
        chosen(only="frist")
    assert error.value.code == "PSG145"
    assert "first" in error.value.hint
