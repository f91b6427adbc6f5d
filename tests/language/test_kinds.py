"""The kinds of sites: the names they bind, in the order in which values are computed."""

from __future__ import annotations

import pytest

from peftsurgery.language.kinds import KINDS, pattern_kind, sizes_of


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_binds_each_name_once_and_its_result_is_a_value(name: str) -> None:
    kind = KINDS[name]
    names = [*kind.values, *kind.weights, *kind.sizes]
    assert len(names) == len(set(names)) == len(kind.names)
    assert kind.result is None or kind.result in kind.values
    assert {*kind.optional, *kind.outputs} <= set(kind.values)


def test_values_come_in_steps() -> None:
    attention = KINDS["attention"]
    assert attention.beside("k") == ("q", "k", "v", "mask")
    assert attention.after("k") == ("o",)
    assert attention.after("x") == ("q", "k", "v", "mask", "o")
    assert attention.computes == "o"
    assert KINDS["linear"].after("W") == ()
    assert KINDS["parameter"].computes is None


def test_the_sizes_of_a_site_are_its_facts_and_no_others() -> None:
    facts = {"width": 32, "op": "rms_norm", "eps": 1e-6}
    assert sizes_of(KINDS["norm"], facts) == {"hidden": 32}
    assert sizes_of(KINDS["linear"], {"in": 4, "out": 6, "op": "mm"}) == {"in": 4, "out": 6}
    assert sizes_of(KINDS["norm"], {}) == {}


def test_a_pattern_binds_its_free_names_and_its_value() -> None:
    kind = pattern_kind(("x", "gate"))
    assert kind.values == ("x", "gate", "y")
    assert (kind.result, kind.after("gate")) == ("y", ("y",))
