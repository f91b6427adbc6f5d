"""What an expression may read depends on where it stands in a rule."""

from __future__ import annotations

from typing import Any

import pytest

import peftsurgery as ps
from peftsurgery.language.rule_file import RuleFile

BASE: dict[str, Any] = {
    "match": "linear",
    "params": {"A": {"shape": ["out", "in"]}},
    "rewrite": "y + linear(x, A)",
    "fold": "W + A",
}


def file(**changes: Any) -> RuleFile:
    data = {"name": "t", "with": {"rank": 4}, "let": {"half": "rank / 2"}}
    return RuleFile.model_validate({**data, "rules": [{**BASE, **changes}]})


@pytest.mark.parametrize(
    "changes",
    [
        {"rewrite": "y * half + x[..., :1] * W[:1, :1] * out"},
        {"rewrite": {"x": "x * rank"}},
        {"rewrite": {"W": "W * rank"}, "fold": {"W": "W * rank"}},
        {"penalty": "sum(A * W, [0, 1]) * rank + out"},
        {"params": {"A": {"shape": ["out", "in"]}, "B": {"shape": ["half"], "init": "norm(A, 1)"}}},
        {"params": {"A": {"shape": ["out", "in"], "shared": "in % 2"}}},
        {"let": {"s": "rank * 2"}, "params": {"A": {"shape": ["out", "in + s - s"]}}},
        {"let": {"D": "A * rank"}, "fold": "W + D"},
        {"when": "half > 1"},
        {"store": "nf4(rank * 16)"},
    ],
    ids=str,
)
def test_what_is_there_may_be_read(changes: dict[str, Any]) -> None:
    assert file(**changes).rules[0].kind.name == "linear"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"fold": "W + y"}, "y"),
        ({"fold": "W + x"}, "x"),
        ({"penalty": "sum(x, -1)"}, "x"),
        ({"params": {"A": {"shape": ["out", "W"]}}}, "W"),
        ({"params": {"A": {"shape": ["B"]}, "B": {"shape": ["out"]}}}, "B"),
        ({"params": {"A": {"shape": ["out", "in"], "shared": "A"}}}, "A"),
        ({"params": {"A": {"shape": ["out", "in"], "init": "norm(B, 1)"}}}, "B"),
        ({"params": {"A": {"shape": ["out", "in"], "init": "norm(x, 1)"}}}, "x"),
        ({"when": "out > 1"}, "out"),
        ({"store": "nf4(out)"}, "out"),
        ({"rewrite": {"x": "x + y"}}, "y"),
        ({"let": {"D": "x * 2"}, "fold": "W + D"}, "D"),
        ({"let": {"first": "second", "second": "1"}}, "second"),
        ({"rewrite": "y + heads"}, "heads"),
    ],
    ids=str,
)
def test_what_is_not_there_yet_may_not(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ps.SurgeryError, match=f"PSG113: unknown name '{name}'"):
        file(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"fold": {"y": "y"}},
        {"rewrite": {"z": "y"}},
        {"store": {"x": "nf4()"}},
        {"let": {"A": "1"}},
        {"let": {"rank": "1"}},
        {"params": {"x": {"shape": ["out"]}}},
        {"params": {"rank": {"shape": ["out"]}}},
        {"rewrite": {}, "fold": {}},
        {"rewrite": {}},
        {"over": "first"},
        {"ranks": {"axes": {"B": 0}, "zero": "B", "target": "1", "total": "1"}},
        {"ranks": {"axes": {"A": 2}, "zero": "A", "target": "1", "total": "1"}},
        {"checkpoint": {"peft": {"B": "lora_B"}}},
    ],
    ids=str,
)
def test_a_name_that_is_not_bound_or_taken_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ps.SurgeryError, match="PSG106"):
        file(**changes)


def test_an_operator_of_another_kind_of_site_is_refused() -> None:
    with pytest.raises(ps.SurgeryError, match="PSG114"):
        file(rewrite="attention(y, y, y)")
