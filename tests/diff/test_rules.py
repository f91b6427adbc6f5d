"""Rule files are compared by what they say, and by what random tensors say of their algebra."""

from __future__ import annotations

from pathlib import Path

import pytest

import peftsurgery as ps
from peftsurgery.diff.rules import rule_entries
from peftsurgery.language.loading import load_rules, parse_rules
from tests.test_house import RULES

THIN = """
name: thin
with: {rank: 2, alpha: 4}
rules:
  - match: linear
    where: {role: attn.q}
    params: {A: {shape: [rank, in]}, B: {shape: [out, rank], init: zeros}}
    rewrite: y + (alpha / rank) * linear(linear(x, A), B)
    fold: W + (alpha / rank) * (B @ A)
"""
SCALED = """
name: scaled
rules:
  - match: linear
    params: {s: {shape: [in], init: ones}}
    rewrite: {x: x * s}
"""
SAME = "the same on random tensors, to 1e-09"


def told(one: str, other: str) -> list[tuple[str, ...]]:
    return [entry[1:] for entry in rule_entries(parse_rules(one), parse_rules(other))]


def verdicts(one: str, other: str) -> list[str]:
    entries = rule_entries(parse_rules(one), parse_rules(other))
    return [text for part, _, _, text in entries if part == "algebra"]


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_a_rule_file_does_not_differ_from_itself(path: Path) -> None:
    assert not list(rule_entries(load_rules(path), load_rules(path)))


def test_settings_sites_and_maths_are_told_apart() -> None:
    other = (
        THIN.replace("alpha: 4", "alpha: 8, dropout: 0.1")
        .replace("attn.q", "attn.v")
        .replace("init: zeros", "init: ones")
        .replace("linear(x, A)", "silu(linear(x, A))")
    )
    assert told(THIN, other) == [
        ("~", "settings", "alpha 8 (was 4)"),
        ("+", "settings", "dropout 0.1"),
        ("~", "rule 1", "is about linear: role attn.v (was linear: role attn.q)"),
        ("~", "rule 1", "adds B [out, rank], initially ones (was [out, rank], initially zeros)"),
        ("~", "rule 1", "y ← y + (α / rank)·B·silu(A·x) (was y + (α / rank)·B·A·x)"),
        *told(THIN, other)[5:],
    ]
    back = told(other, THIN)
    assert [sign for sign, *_ in back[:5]] == ["~", "-", "~", "~", "~"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(alpha / rank) * linear(linear(x, A), B)", "linear(alpha * linear(x, A), B) / rank"),
        ("y + (alpha / rank) * linear(linear(x, A), B)",
         "linear(x, W + (alpha / rank) * B @ A, b)"),
        ("(B @ A)", "transpose(transpose(A, 0, 1) @ transpose(B, 0, 1), 0, 1)"),
    ],
)  # fmt: skip
def test_another_text_of_the_same_algebra_is_the_same(old: str, new: str) -> None:
    assert verdicts(THIN, THIN.replace(old, new)) == [f"rewrite: {SAME}", f"fold: {SAME}"]


def test_parameters_of_other_names_are_known_by_their_shapes() -> None:
    renamed = THIN.replace("A:", "down:").replace(", A)", ", down)").replace("@ A", "@ down")
    assert verdicts(THIN, renamed) == [f"rewrite: {SAME}", f"fold: {SAME}"]


def test_what_is_done_to_the_input_is_held_against_what_is_done_to_the_result() -> None:
    assert verdicts(SCALED, SCALED.replace("{x: x * s}", "linear(x * s, W, b)")) == [
        f"rewrite: {SAME}"
    ]


def test_a_difference_has_its_size() -> None:
    plain = SCALED.replace("[in]", "[out]").replace("{x: x * s}", "y * s")
    (verdict,) = verdicts(plain, plain.replace("y * s", "1.5 * y * s"))
    # 0.5 of 1.5 times whatever the largest value is
    assert verdict.startswith("rewrite: differs by up to 0.33 of the largest value, at in ")


def test_a_setting_alone_changes_what_is_computed_but_not_the_algebra() -> None:
    found = verdicts(THIN, THIN.replace("alpha: 4", "alpha: 8"))
    assert f"rewrite: {SAME}, with equal settings" in found
    assert any("differs by up to" in each and "the settings of each" in each for each in found)
    found = verdicts(THIN, THIN.replace("rank: 2", "rank: 3"))
    assert found[0] == f"rewrite: {SAME}, with equal settings"
    assert found[1].startswith("rewrite: cannot be said: A is [2, ")


def test_what_only_a_model_has_cannot_be_said() -> None:
    pattern = 'name: p\nrules: [{match: {pattern: "mul(silu(a), b)"}, rewrite: {y: 2 * y}}]'
    assert verdicts(pattern, pattern.replace("2 * y", "y + y")) == [
        "rewrite: cannot be said: only a model has such sites"
    ]


def test_a_rule_put_first_is_one_rule_more() -> None:
    first = "\n  - {match: norm, params: {g: {shape: [hidden]}}, rewrite: y * g}"
    found = told(THIN, THIN.replace("\nrules:", f"\nrules:{first}"))
    assert {(sign, place) for sign, place, _ in found} == {("+", "rule 1")}


def test_the_difference_of_two_files_has_what_their_rules_say(tmp_path: Path) -> None:
    one, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    one.write_text(THIN)
    other.write_text(THIN.replace("silu", "").replace("rank: 2", "rank: 4"))
    found = ps.diff(one, other)
    assert found
    assert "settings: rank 4 (was 2)" in str(found)
    assert "On random tensors" in str(found)
    parts = {change["part"] for change in found.to_dict()["changes"]}
    assert parts == {"rule", "algebra"}
