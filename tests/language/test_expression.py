"""Expressions: what the grammar takes, what it refuses, and where it points."""

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftsurgery.errors import SurgeryError
from peftsurgery.language.expression import check_calls, check_names, parse, within
from peftsurgery.language.position import Position, Text

REFUSED = {
    "x.T": "PSG111",
    "x.__class__": "PSG111",
    "lambda: 1": "PSG111",
    "[i for i in x]": "PSG111",
    "f'{x}'": "PSG111",
    "'text'": "PSG111",
    "f(*a)": "PSG111",
    "norm(**k)": "PSG111",
    "__import__(x)": "PSG111",
    "__x + 1": "PSG111",
    "(a := 1)": "PSG111",
    "a and b": "PSG111",
    "not a": "PSG111",
    "~a": "PSG111",
    "a | b": "PSG111",
    "a << 3": "PSG111",
    "1 < a < 3": "PSG111",
    "a in b in c": "PSG110",
    "f(x)(y)": "PSG111",
    "{1: 2}": "PSG111",
    "3j": "PSG111",
    "α": "PSG111",
    "x\x00": "PSG111",
    "x; y": "PSG111",
    "": "PSG110",
    "x +": "PSG110",
    "(x": "PSG110",
    "a) + (b": "PSG110",
    "x ** 65": "PSG112",
    "x ** -65": "PSG112",
    "(x ** 2) ** 2": "PSG112",
    "2 ** (x ** 2)": "PSG112",
    "9" * 30: "PSG112",
    "9" * 1900: "PSG112",
    "1e400": "PSG112",
    "-" * 1900 + "1": "PSG112",
    "x" * 2001: "PSG112",
    "+".join("x" * 150): "PSG112",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20] or "empty")
def test_what_is_not_in_the_language_is_refused_with_its_code(text):
    with pytest.raises(SurgeryError) as refusal:
        parse(text, "rule.yaml")
    assert refusal.value.code == REFUSED[text]
    assert refusal.value.where.startswith("rule.yaml:1:")


def parsed(text):
    """The tree of a text, or None if it is refused with one of the codes for that."""
    try:
        return parse(text).tree
    except SurgeryError as refusal:
        if refusal.code not in ("PSG110", "PSG111", "PSG112"):
            raise
        return None


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text_parses_or_is_refused_with_a_code(text):
    tree = parsed(text)
    assert tree is None or isinstance(tree, ast.AST)


@given(st.text(alphabet="()[]{}.,:+-*/@%<>=!'\"\\_ abinforlmd019\n", max_size=80))
@settings(max_examples=500, deadline=None)
def test_what_parses_holds_nothing_but_the_language(text):
    tree = parsed(text)
    names = set() if tree is None else {type(node).__name__ for node in ast.walk(tree)}
    assert not names & {"Attribute", "Lambda", "ListComp", "JoinedStr", "Starred", "BoolOp"}


@pytest.mark.parametrize("text", ["(" * 1000, "[" * 1999, "-" * 1999, "f(" * 900 + ")" * 900])
def test_deep_nesting_never_overflows(text):
    with pytest.raises(SurgeryError):
        parse(text)


def test_names_and_calls_are_told_apart():
    expression = parse("y + linear(dropout(x, dropout), in)")
    assert set(expression.names) == {"y", "x", "dropout", "in"}
    assert set(expression.calls) == {"linear", "dropout"}


def test_an_unknown_name_is_refused_at_its_column_with_the_nearest():
    expression = parse(Text("y + aplha * in", Position("r.yaml", 7, 14)))
    with pytest.raises(SurgeryError) as refusal:
        check_names(expression, {"alpha", "y", "in"})
    assert refusal.value.code == "PSG113"
    assert refusal.value.where == "r.yaml:7:18"
    assert "alpha" in refusal.value.hint


def test_columns_count_characters_after_the_name_in():
    expression = parse("in + in + rnk", "r")
    with pytest.raises(SurgeryError) as refusal:
        check_names(expression, {"in"})
    assert refusal.value.where == "r:1:11"


def test_an_unknown_operator_is_refused_with_the_nearest():
    with pytest.raises(SurgeryError) as refusal:
        check_calls(parse("liner(x, W)"), {"linear", "norm"})
    assert refusal.value.code == "PSG114"
    assert "linear" in refusal.value.hint


def test_an_expression_may_run_over_several_lines():
    assert parse("y\n + x").names.keys() == {"y", "x"}


def test_a_name_is_within_reach_if_all_that_it_depends_on_is():
    let = {"a": parse("in * 2"), "b": parse("a + x"), "c": parse("a + out")}
    assert within(let, {"in", "out"}) == {"in", "out", "a", "c"}
    assert within(let, {"in", "x"}) == {"in", "x", "a", "b"}
