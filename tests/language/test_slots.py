"""Slots: a rule says with them what it says with its settings, at any size."""

from __future__ import annotations

import pytest
import torch

from peftsurgery.language.loading import load_rules, parse_rules
from peftsurgery.language.readings import rewrite
from peftsurgery.language.settings import resolve_settings
from peftsurgery.language.slots import SWITCH, SlottedRule, slotted

FREE = {
    "lora_qv": [{"A": (0,), "B": (1,)}],
    "dora": [{"A": (0,), "B": (1,)}],
    "ia3": [{}, {}],
    "pfeiffer": [{"D": (0,), "bd": (0,), "U": (1,)}],
    "prefix_tuning": [{"K": (0,), "V": (0,)}, {}, {}],
    "prompt_tuning": [{"P": (0,)}],
    "mam_adapter": [
        {"E": (0,), "W": (0,), "b": (0,), "WK": (1,), "WV": (1,)},
        {"D": (0,), "bd": (0,), "U": (1,)},
    ],
    "lora_conv": [{}],  # groups and ranks are one size there
}


def slots(name: str, **settings: object) -> tuple[SlottedRule, ...]:
    file = load_rules(name)
    return slotted(file, resolve_settings(file, settings))


@pytest.mark.parametrize("name", FREE)
def test_the_sizes_that_an_adapter_decides_are_free(name: str) -> None:
    assert [dict(each.free) for each in slots(name)] == FREE[name]


def test_a_number_that_a_tensor_meets_is_a_parameter() -> None:
    (rule,) = slots("lora_qv", alpha=3)
    assert rule.numbers == {"scale_slot"}
    assert str(rule.rule.rewrite["y"]) == (
        "y + linear(scale_slot * linear(dropout(x, dropout), A), B)"
    )
    assert str(rule.rule.params["scale_slot"].init) == "scale"


def test_a_number_that_more_than_linears_meets_stays_where_it_is() -> None:
    (rule,) = slots("pfeiffer")
    assert str(rule.rule.rewrite["h"]).startswith("h + dropout(scaling_slot * linear(inner, U, bu)")


@pytest.mark.parametrize("name", ["dora", "loha", "lokr", "oft"])
def test_a_rule_that_makes_weights_has_a_switch(name: str) -> None:
    (rule,) = slots(name)
    (new,) = rule.rule.rewrite.values()
    (old,) = rule.rule.rewrite
    assert str(new).startswith(f"choose({SWITCH}, ")
    assert str(new).endswith(f", {old})")
    assert str(rule.rule.params[SWITCH].init) == "1"
    assert SWITCH in rule.numbers


def test_a_size_is_read_off_its_parameter() -> None:
    rule = slots("prefix_tuning")[0].rule
    assert str(rule.rewrite["o"]).endswith("extend(mask, size(K, 0)))")


def test_a_size_that_another_rule_of_the_file_reads_is_fixed() -> None:
    # with `shift` the positions move on by the length, where there is no prefix to read it off
    assert [dict(each.free) for each in slots("prefix_tuning", shift=True)] == [{}, {}, {}]
    assert "length" in str(slots("prefix_tuning", shift=True)[0].rule.rewrite["o"])


def test_a_size_that_more_is_computed_from_is_fixed() -> None:
    file = parse_rules(
        """
        name: odd
        with: {rank: 2}
        let: {last: rank - 3}
        rules:
          - match: linear
            params: {A: {shape: [rank, in]}, B: {shape: [out, rank]}}
            rewrite: y + linear(linear(x, A), B) * softmax(x, last)
        """
    )
    (rule,) = slotted(file, resolve_settings(file))
    assert dict(rule.free) == {}
    assert rule.numbers == set()


def test_what_no_setting_says_is_no_slot() -> None:
    file = parse_rules(
        """
        name: plain
        with: {gain: 3.0}
        rules:
          - match: linear
            params: {s: {shape: [out]}}
            rewrite: 1 - 2 * y * (gain + in) / out + s
        """
    )
    (rule,) = slotted(file, resolve_settings(file))
    assert str(rule.rule.rewrite["y"]) == "1 - 2 * y * slot0 / out + s"
    assert str(rule.rule.params["slot0"].init) == "gain + in"


@pytest.mark.parametrize("rank", [1, 4])
def test_a_rule_computes_with_slots_what_it_computes_without(rank: int) -> None:
    torch.manual_seed(0)
    file = load_rules("lora_qv")
    settings = resolve_settings(file, {"rank": rank, "alpha": 5, "stabilised": True})
    W, x = torch.randn(6, 4), torch.randn(3, 4)
    A, B = torch.randn(rank, 4), torch.randn(6, rank)
    sizes = {"x": x, "W": W, "y": x @ W.T, "b": 0.0, "A": A, "B": B, "in": 4, "out": 6}
    (rule,) = slots("lora_qv", rank=7, alpha=1)  # made for another rank
    env = {**resolve_settings(file, {"rank": 7, "alpha": 1}), **sizes}
    given = torch.tensor([5 / rank**0.5])
    new = rewrite(rule.rule, {**env, "scale_slot": given})["y"]
    wanted = x @ W.T + 5 / rank**0.5 * (x @ A.T @ B.T)
    torch.testing.assert_close(new, wanted)
    torch.testing.assert_close(rewrite(file.rules[0], {**env, **settings})["y"], wanted)
