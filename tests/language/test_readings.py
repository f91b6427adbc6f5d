"""Rewrite, fold and shapes of a rule."""

import pytest
import torch

from peftsurgery.errors import SurgeryError
from peftsurgery.language.loading import parse_rules
from peftsurgery.language.readings import fold, rewrite, shape_of


def rule_of(body, head=""):
    return parse_rules(f"name: t\n{head}\nrules:\n  - {{match: linear, {body}}}\n").rules[0]


def test_a_fold_does_not_touch_what_is_about_activations():
    rule = rule_of("let: {e: x * 2, d: W * 3}, rewrite: y + e, fold: d")
    assert fold(rule, {"W": torch.ones(2), "b": 0.0})["W"].tolist() == [3.0, 3.0]


def test_a_let_value_is_computed_once():
    rule = rule_of("let: {d: 'dropout(x, 0.5)'}, rewrite: d - d")
    from peftsurgery.language.evaluation import Context

    x = torch.ones(1000)
    assert not rewrite(rule, {"x": x, "y": x}, Context(training=True))["y"].any()


def test_several_bindings_are_rewritten_and_folded():
    rule = rule_of("rewrite: {x: x * 2, y: y * 3}, fold: {W: W * 6, b: b * 3}")
    env = {"x": 1.0, "y": 1.0, "W": 1.0, "b": 1.0}
    assert rewrite(rule, env) == {"x": 2.0, "y": 3.0}
    assert fold(rule, env) == {"W": 6.0, "b": 3.0}


@pytest.mark.parametrize(
    ("size", "value"), [("in // 2", 4), ("in * out", 48), ("h", 16), ("kernel[1]", None)]
)
def test_sizes_are_computed(size, value):
    if value is None:
        rule = parse_rules(
            f"name: t\nrules: [{{match: conv, rewrite: y, params: {{A: {{shape: ['{size}']}}}}}}]"
        ).rules[0]
        value, env = 5, {"kernel": (3, 5)}
    else:
        body = f"rewrite: y, let: {{h: in * 2}}, params: {{A: {{shape: ['{size}']}}}}"
        rule, env = rule_of(body), {"in": 8, "out": 6}
    assert shape_of(rule.params["A"], rule, env) == (value,)


@pytest.mark.parametrize("size", ["in / 2", "0", "in - 9", "0.5", "in > 3", "2 ** 40"])
def test_a_size_that_is_no_positive_whole_number_is_refused(size):
    rule = rule_of(f"rewrite: y, params: {{A: {{shape: ['{size}']}}}}")
    with pytest.raises(SurgeryError) as refusal:
        shape_of(rule.params["A"], rule, {"in": 8, "out": 6})
    assert refusal.value.code == "PSG122"
