"""Settings: defaults, overrides and the numbers made of them."""

import inspect

import numpy as np
import pytest
import torch

import peftsurgery as ps
from peftsurgery.errors import SurgeryError
from peftsurgery.language.loading import load_rules, parse_rules
from peftsurgery.language.settings import (
    check_settings,
    parse_override,
    parse_overrides,
    resolve_settings,
)
from peftsurgery.language.shipped import shipped

FILE = parse_rules(
    "name: t\nwith: {rank: 8, p: 0.1, on: true, word: a, layers: [0, 1], free: null}\n"
    "let: {half: rank / 2, quarter: half / 2}\nrules: [{match: linear, rewrite: y}]\n"
)


def test_defaults_and_numbers_computed_in_order():
    settings = resolve_settings(FILE)
    assert settings["half"] == 4
    assert settings["quarter"] == 2


def test_an_override_changes_what_is_computed_from_it():
    assert resolve_settings(FILE, {"rank": 16})["quarter"] == 4
    assert resolve_settings(load_rules("rslora"), {"rank": 4})["scale"] == 16 / 4**0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", "8"), ("rank", True), ("rank", float("nan")), ("on", 1), ("word", 3), ("p", [1])],
)
def test_a_value_of_another_type_is_refused(name, value):
    with pytest.raises(SurgeryError) as refusal:
        resolve_settings(FILE, {name: value})
    assert refusal.value.code == "PSG121"


def test_values_of_the_same_type_and_free_settings_are_taken():
    given = {"p": 0, "rank": 2.0, "layers": (3,), "free": "anything"}
    settings = resolve_settings(FILE, given)
    assert settings["layers"] == [3]
    assert settings["free"] == "anything"
    assert resolve_settings(FILE, {"layers": 2})["layers"] == [2]


def test_an_unknown_setting_is_refused_with_the_nearest():
    with pytest.raises(SurgeryError) as refusal:
        resolve_settings(FILE, {"rnk": 4})
    assert refusal.value.code == "PSG120"
    assert "rank" in refusal.value.hint


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("rank=16", ("rank", 16)),
        ("p=1e-3", ("p", 1e-3)),
        ("on=false", ("on", False)),
        ("word=yes", ("word", "yes")),
        ("layers=0,2", ("layers", [0, 2])),
        ("layers=[3]", ("layers", [3])),
        ("word=a=b", ("word", "a=b")),
    ],
)
def test_overrides_are_read_like_yaml(text, pair):
    assert parse_override(text) == pair


def test_an_override_without_a_value_is_refused():
    with pytest.raises(SurgeryError) as refusal:
        parse_override("rank")
    assert refusal.value.code == "PSG121"


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(4), 4),
        (np.float32(0.5), 0.5),
        (torch.tensor(4), 4),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (np.array(4), 4),
    ],
)
def test_scalars_of_numpy_and_torch_are_the_numbers_they_hold(value, plain):
    taken = resolve_settings(FILE, {"rank": value})["rank"]
    assert (taken, type(taken)) == (plain, type(plain))


@pytest.mark.parametrize("value", [np.array([1, 2]), torch.tensor([1, 2]), (1, 2), range(1, 3)])
def test_sequences_of_numbers_are_lists(value):
    assert resolve_settings(FILE, {"layers": value})["layers"] == [1, 2]
    assert resolve_settings(FILE, {"layers": np.int8(1)})["layers"] == [1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers", [[1]]),
        ("layers", [object()]),
        ("layers", [float("inf")]),
        ("rank", 10**30),
        ("rank", np.float64("nan")),
        ("rank", torch.tensor([1, 2])),
        ("rank", torch.empty((), device="meta")),
        ("rank", int),
        ("free", object()),
        ("free", {"a": 1}),
    ],
)
def test_what_no_rule_can_compute_with_is_refused(name, value):
    with pytest.raises(SurgeryError) as refusal:
        resolve_settings(FILE, {name: value})
    assert refusal.value.code == "PSG121"


def test_every_word_that_apply_takes_for_itself_is_refused_as_a_setting():
    own = inspect.signature(ps.apply).parameters.values()
    words = [one.name for one in own if one.kind is not inspect.Parameter.VAR_KEYWORD]
    assert "settings" in words
    for word in words:
        with pytest.raises(SurgeryError) as refusal:
            parse_rules(f"name: t\nwith: {{{word}: 1}}\nrules: [{{match: linear, rewrite: y}}]")
        assert (refusal.value.code, refusal.value.where) == ("PSG106", "<text>:2:8")


@pytest.mark.parametrize("name", shipped())
def test_a_size_of_zero_is_refused_by_the_name_of_the_setting_and_before_any_division(name):
    file = load_rules(name)
    sizes = {e.text for rule in file.rules for p in rule.params.values() for e in p.shape}
    for setting in sizes & file.with_.keys():
        with pytest.raises(SurgeryError) as refusal:
            resolve_settings(file, {setting: 0})
        assert refusal.value.code == "PSG122"
        assert refusal.value.message == f"{setting} must be at least 1, and it is 0"
        with pytest.raises(SurgeryError, match="must be a whole number"):
            resolve_settings(file, {setting: 2.5})


def test_a_rule_that_is_left_out_has_no_sizes():
    file = parse_rules(
        "name: t\nwith: {rank: 8}\nrules: [{match: linear, rewrite: y}, {match: linear, "
        "when: rank > 0, params: {A: {shape: [rank, in]}}, rewrite: 'y + sum(A)'}]"
    )
    assert resolve_settings(file, {"rank": 0})["rank"] == 0


def test_a_division_by_zero_names_the_divisor():
    file = parse_rules(
        "name: t\nwith: {k: 0}\nlet: {s: 1 / k}\nrules: [{match: linear, rewrite: y}]"
    )
    with pytest.raises(SurgeryError, match="k is 0, by which nothing can be divided"):
        resolve_settings(file)


def test_settings_are_checked_for_all_files_together():
    files = [FILE, load_rules("prompt_tuning")]
    check_settings(files, {"rank": 2, "length": 3, "init_text": "as a text"})
    for settings, code in (
        ({"rnk": 2}, "PSG120"),
        ({"init_text": 3}, "PSG121"),
        ({"rank": "2"}, "PSG121"),
        ({"length": 0}, "PSG122"),
    ):
        with pytest.raises(SurgeryError) as refusal:
            check_settings(files, settings)
        assert refusal.value.code == code


def test_a_setting_given_twice_is_refused():
    assert parse_overrides(["rank=2", "p=0.5"]) == {"rank": 2, "p": 0.5}
    with pytest.raises(SurgeryError) as refusal:
        parse_overrides(["rank=2", " rank = 2"])
    assert refusal.value.code == "PSG121"


def test_nothing_in_place_of_a_list_is_nothing() -> None:
    # as a page says it: `roles: null` is every linear
    assert resolve_settings(load_rules("lora"), {"roles": None})["roles"] is None
    assert resolve_settings(load_rules("lora"), {"roles": "attn.k"})["roles"] == ["attn.k"]
