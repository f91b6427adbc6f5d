"""Settings: defaults, overrides and the numbers made of them."""

import pytest

from peftsurgery.errors import SurgeryError
from peftsurgery.language import load_rules, parse_override, parse_rules, resolve_settings

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
