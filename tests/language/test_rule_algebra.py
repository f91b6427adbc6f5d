"""What is known of a rule's algebra, tried on specimens."""

from __future__ import annotations

import pytest

from peftsurgery.language.loading import load_rules
from peftsurgery.language.rule_algebra import Effect, effects
from peftsurgery.language.settings import resolve_settings


def effect(name: str, **settings: object) -> tuple[Effect, dict[str, object]]:
    """The first rule of a file on a specimen, and its settings."""
    file = load_rules(name)
    numbers = dict(resolve_settings(file, settings))
    return next(effects(file.rules[0], numbers)), numbers


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("lora_qv", [{"A"}, {"B"}]),
        ("pfeiffer", [{"U", "bu"}]),
        ("ia3", []),
        ("lora_bias", [{"A", "c"}]),
    ],
)
def test_a_change_is_proportional_to_its_factors(name: str, factors: list[set[str]]) -> None:
    made, numbers = effect(name)
    assert made.factors(numbers) == factors


@pytest.mark.parametrize(("name", "is_affine"), [("ia3", True), ("lora_qv", False)])
def test_a_change_is_affine_in_all_parameters_or_not(name: str, is_affine: bool) -> None:
    made, numbers = effect(name)
    assert made.is_affine(numbers) is is_affine


def test_changes_under_other_settings_are_multiples_of_each_other_or_not() -> None:
    made, numbers = effect("lora_qv", rank=4, alpha=8)
    _, other = effect("lora_qv", rank=8, alpha=8)
    assert made.ratio(numbers, other, ["rank"]) == pytest.approx(2.0)  # 8 / 4 and 8 / 8
    made, numbers = effect("pfeiffer", non_linearity="relu")
    _, other = effect("pfeiffer", non_linearity="tanh")
    assert made.ratio(numbers, other, []) is None
