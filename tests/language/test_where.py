"""`where`: layers as ranges, settings in the place of values, and what a file may write."""

from __future__ import annotations

from typing import Any

import pytest

import peftsurgery as ps
from peftsurgery.language.where import Where, check_references, layer_range, references, substitute


@pytest.mark.parametrize(
    ("item", "layers"),
    [(3, [3]), ("3", [3]), ("2..", [2, 3, 4]), ("..1", [0, 1]), ("1..3", [1, 2, 3])],
)
def test_a_range_of_layers_has_both_its_ends(item: int | str, layers: list[int]) -> None:
    low, high = layer_range(item)
    assert [layer for layer in range(5) if low <= layer <= high] == layers


@pytest.mark.parametrize("item", ["", "..", "a", "3...", "-1", True, 1.5])
def test_what_is_no_range_of_layers_is_refused(item: Any) -> None:
    with pytest.raises(ps.SurgeryError, match="PSG106"):
        Where.model_validate({"layers": item})


@pytest.mark.parametrize(
    ("clauses", "expected"),
    [
        ({"role": "$part"}, {"role": ("attn.q",)}),
        ({"role": ["$many", "lm_head"]}, {"role": ("attn.k", "attn.v", "lm_head")}),
        ({"path": "layers.$number.up"}, {"path": "layers.2.up"}),
        ({"layers": "$number"}, {"layers": (2,)}),
        ({"role": "$nothing", "type": "Linear"}, {"type": ("Linear",)}),
        ({"facts": {"causal": "$nothing", "heads": 4}}, {"facts": {"heads": 4}}),
        ({"shape": [None, 8]}, {"shape": (None, 8)}),
        ({"role": "$none"}, {"role": ()}),
    ],
)
def test_a_setting_stands_where_its_name_stood(
    clauses: dict[str, Any], expected: dict[str, Any]
) -> None:
    settings = {"part": "attn.q", "many": ["attn.k", "attn.v"], "number": 2, "none": []}
    bound = Where.model_validate(clauses).bind({**settings, "nothing": None})
    assert bound.given() == expected


def test_settings_are_found_at_any_depth() -> None:
    where = Where.model_validate({"any": [{"role": "$a"}, {"not": {"layers": "$b"}}], "path": "x"})
    assert references(where) == ["a", "b"]
    check_references(where, {"a": 1, "b": 2})
    with pytest.raises(ps.SurgeryError, match=r"PSG120.*'\$b'"):
        check_references(where, {"a": 1})


def test_clauses_that_were_bound_are_bound_again_to_themselves() -> None:
    where = Where.model_validate({"role": ["$r"], "feeds": {"kind": "self"}})
    bound = where.bind({"r": ["attn.q"]})
    assert bound.bind({}) == bound
    assert substitute(bound, {}) == {"role": ["attn.q"], "feeds": {"kind": ["self"]}}
