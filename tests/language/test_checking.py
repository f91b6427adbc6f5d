"""rules check: it proves what is right and finds what is wrong."""

import pytest

from peftsurgery.errors import SurgeryError
from peftsurgery.language import check_rules, load_rules, operator, parse_rules, shipped

RIGHT = {
    "match: linear, rewrite: y * s, fold: {W: 'W * s[:, None]', b: b * s}, "
    "params: {s: {shape: [out], init: ones}}": 3,
    "match: linear, rewrite: {x: x * s}, fold: W * s, params: {s: {shape: [in], init: ones}}": 3,
    "match: norm, rewrite: y + c, fold: {b: b + c}, params: {c: {shape: [hidden]}}": 2,
    "match: residual, rewrite: 'h + linear(relu(linear(h, D)), U)', "
    "params: {D: {shape: [3, hidden]}, U: {shape: [hidden, 3]}}": 2,
    "match: attention, rewrite: o * g, params: {g: {shape: [1]}}": 2,
    "match: experts, rewrite: 'y + matmul(x, transpose(D))', fold: W + D, "
    "params: {D: {shape: [experts, out, in]}}": 2,
}

WRONG = {
    "rewrite: 'y + 2 * linear(x, A)', fold: W + A": "PSG130",
    "rewrite: y * 2, fold: W * 2": "PSG130",
    "rewrite: 'y + linear(x, A)', fold: W - A": "PSG130",
    "rewrite: 'sum(y, -1)'": "PSG131",
    "rewrite: 'y[..., None]'": "PSG131",
    "rewrite: 'y + linear(x, A)', fold: 'sum(W, 0)'": "PSG131",
    "rewrite: 'y + linear(y, A)'": "PSG116",
    "rewrite: 'y + linear(x, A)', fold: A @ W": "PSG116",
    "rewrite: 'looks_at_values_for_test(y)'": "PSG132",
    "rewrite: 'norm(y)'": "PSG115",
}


@operator("looks_at_values_for_test")
def looks(value):
    """Looks at a value, which a graph cannot."""
    return value * float(value.sum())


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_rule_fits_and_folds_to_what_it_rewrites_if_it_folds(name):
    file = load_rules(name)
    report = check_rules(file)
    assert not any(file.rules[number - 1].rewrite for number in report.unchecked)
    for check in report.checks:
        folds = bool(file.rules[check.rule - 1].fold)
        assert (check.folded is not None) == folds
        assert check.folded is None or check.folded < 1e-12


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dora_agrees_with_and_without_dropout(dropout):
    assert check_rules(load_rules("dora"), {"dropout": dropout}).checks


@pytest.mark.parametrize("body", RIGHT)
def test_right_rules_pass_at_every_size(body):
    report = check_rules(parse_rules(f"name: t\nrules: [{{{body}}}]"))
    assert len(report.checks) == RIGHT[body]


@pytest.mark.parametrize("body", WRONG)
def test_a_wrong_rule_is_refused_by_its_number_and_the_sizes(body):
    text = f"name: t\nrules: [{{match: linear, params: {{A: {{shape: [out, in]}}}}, {body}}}]"
    with pytest.raises(SurgeryError) as refusal:
        check_rules(parse_rules(text, "t.yaml"))
    assert refusal.value.code == WRONG[body]


def test_the_message_names_rule_expression_and_sizes():
    text = "name: t\nrules: [{match: linear, rewrite: y * 2, fold: W * 3}]"
    with pytest.raises(SurgeryError) as refusal:
        check_rules(parse_rules(text, "t.yaml"))
    assert "rule 1 (linear) at in 18, out 14" in refusal.value.message
    assert "W = W * 3" in refusal.value.message
    assert refusal.value.where.startswith("t.yaml:2:")


def test_rules_that_only_a_model_can_check_are_listed():
    text = "name: t\nrules:\n  - {match: parameter, train: true}\n"
    assert check_rules(parse_rules(text)).unchecked == (1,)
