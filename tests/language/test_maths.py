"""The symbolic reading: maths that mean what the expression means."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftsurgery.language.describe import describe_rules
from peftsurgery.language.expression import parse
from peftsurgery.language.loading import load_rules
from peftsurgery.language.maths import maths
from peftsurgery.language.shipped import shipped

SETTINGS = {"alpha": 16, "rank": 8, "dropout": 0.0}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("y + (alpha / rank) * linear(linear(x, A), B)", "y + (α / rank)·B·A·x"),
        ("y + alpha / sqrt(rank) * linear(x, A, b)", "y + (α / √rank)·(A·x + b)"),
        ("W + alpha * (B @ A)", "W + α·B·A"),
        ("linear(x + y, W)", "W·(x + y)"),
        ("linear(x * y, W)", "W·(x ⊙ y)"),
        ("y * s", "y ⊙ s"),
        ("a - (b - c)", "a − (b − c)"),
        ("a / (b / c)", "a / (b / c)"),
        ("-(a + b)", "−(a + b)"),
        ("m / detach(norm(W + B, 1))", "m / ‖W + B‖"),
        ("g[:, None] * W", "g[:, None] ⊙ W"),
        ("embedding(x, W)", "W[x]"),
        ("transpose(B @ A)", "(B·A)ᵀ"),
        ("x if dropout > 0 else y", "y"),
        ("dropout(x, dropout)", "drop(x)"),
        ("x ** 2 + 1.0", "x^2 + 1"),
        ("softmax(x, dim=1)", "softmax(x, dim=1)"),
        ("silu(a) * b", "silu(a) ⊙ b"),
    ],
)
def test_an_expression_prints_as_maths(text, shown):
    assert maths(parse(text), SETTINGS) == shown


leaves = st.sampled_from(["u", "v", "w", "2"])
expressions = st.recursive(
    leaves,
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
        lambda t: f"({t[0]} {t[1]} {t[2]})"
    ),
    max_leaves=8,
)


@given(expressions)
@settings(max_examples=200, deadline=None)
def test_printed_arithmetic_has_the_value_of_the_expression(text):
    names = {"u": 3.0, "v": 5.0, "w": 7.0}
    try:
        expected = eval(text, {}, dict(names))
    except ZeroDivisionError:
        return
    shown = maths(parse(text), scalars=names)
    back = shown.replace("·", "*").replace("−", "-").replace("⊙", "*")
    assert eval(back, {}, dict(names)) == pytest.approx(expected)


@pytest.mark.parametrize("name", shipped())
def test_a_description_names_settings_parameters_and_clauses(name):
    file = load_rules(name)
    text = describe_rules(file)
    assert all(f"{setting} = {value}" in text for setting, value in file.with_.items())
    for rule in file.rules:
        assert all(f"adds {param} [" in text for param in rule.params)
        assert all(f"folds into {weight} ← " in text for weight in rule.fold)
    assert "arXiv" in text


def test_the_count_of_parameters_is_a_formula():
    assert "rank·in + out·rank" in describe_rules(load_rules("lora_qv"))
