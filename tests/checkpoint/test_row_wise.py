"""Which rules fold each row of a weight by itself."""

from __future__ import annotations

from typing import Any

import pytest

from peftsurgery.checkpoint.row_wise import line_axes, row_axes
from peftsurgery.language.loading import load_rules, parse_rules
from peftsurgery.language.schema import Rule
from peftsurgery.language.settings import resolve_settings

SITES: dict[str, dict[str, Any]] = {
    "linear": {"in": 64, "out": 96},
    "embedding": {"in": 100, "out": 32},
    "experts": {"in": 64, "out": 96, "experts": 8},
    "conv": {"in": 64, "out": 96, "kernel": (3, 3), "groups": 1},
}


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("lora_qv", {"B": 0}),
        ("dora", {"B": 0, "m": 0}),
        ("oft", {}),
        ("lora_embedding", {"A": 1}),
        ("lora_experts", {"A": 0, "B": 0}),
        ("adalora_conv", {"B": 0}),
        ("lora_conv", {"B": 0}),
    ],
)
def test_methods_that_fold_every_row_by_itself(name: str, axes: dict[str, int]) -> None:
    file = load_rules(name)
    (rule,) = (rule for rule in file.rules if rule.fold)
    assert row_axes(rule, {**resolve_settings(file), **SITES[rule.kind.name]}) == axes


@pytest.mark.parametrize(
    ("name", "is_turned", "axes"),
    [
        ("lora_qv", True, [{"A": 1}]),
        ("lora_qv", False, [{"B": 0}]),
        ("ia3", True, [None, {"s": 1}]),  # the first rule is for a bias too
        ("dora", True, [None]),  # the norm is of a row
        ("lora_experts", False, [{"B": 1}]),
        ("lora_experts", True, [{"A": 2}]),
        ("adalora_conv", True, [None]),
    ],
)
def test_methods_that_fold_every_line_by_itself(
    name: str, is_turned: bool, axes: list[dict[str, int] | None]
) -> None:
    file = load_rules(name)
    settings = resolve_settings(file)
    rules = [rule for rule in file.rules if rule.fold]
    kinds = (SITES[rule.kind.name] for rule in rules)
    found = [
        line_axes(rule, {**settings, **sizes}, is_turned)
        for rule, sizes in zip(rules, kinds, strict=True)
    ]
    assert found == axes


def test_rows_of_a_kernel_with_groups_are_mixed() -> None:
    file = load_rules("lora_conv")
    (rule,) = file.rules
    assert row_axes(rule, {**resolve_settings(file), **SITES["conv"], "groups": 4}) is None


def made(kind: str, fold: str, shape: str = "[]") -> Rule:
    """A rule of that fold, with a parameter s of that shape."""
    text = f"""
name: made
rules:
  - match: {kind}
    params: {{s: {{shape: {shape}, init: zeros}}}}
    rewrite: "y * s"
    fold: "{fold}"
"""
    return parse_rules(text).rules[0]


def test_sizes_are_tried_until_the_rule_is_for_them() -> None:
    rule = made("linear", "view_as(reshape(W, [-1, in // 16, 16]) * s, W)", "[in // 16, 1]")
    assert row_axes(rule, SITES["linear"]) == {}


@pytest.mark.parametrize(
    ("kind", "fold", "shape"),
    [
        ("linear", "W - s * norm(W, 0)", "[]"),
        ("linear", "s @ W", "[out, out]"),
        ("conv", "view_as(s @ reshape(W, [out, -1]), W)", "[out, out]"),
        ("norm", "W * s", "[hidden]"),
    ],
)
def test_rows_that_are_mixed_or_cannot_be_tried_are_not_folded_by_themselves(
    kind: str, fold: str, shape: str
) -> None:
    assert row_axes(made(kind, fold, shape), SITES.get(kind, {"hidden": 8})) is None


def test_nothing_is_said_of_more_groups_than_are_tried() -> None:
    rule = made("conv", "W * s")
    assert row_axes(rule, SITES["conv"]) == {}
    assert row_axes(rule, {**SITES["conv"], "groups": 1024}) is None
