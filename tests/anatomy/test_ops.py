"""Every row of the operator table agrees with what torch's own schemas, tags and kernels say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from peftsurgery.anatomy.ops import TABLE, Meaning, Trait, traits
from peftsurgery.capture.operands import PARTED
from peftsurgery.capture.schemas import shares_memory, writes

# What a graph has from elsewhere than aten: Python's own, ours, prims' and transformers'.
ELSEWHERE = {"getitem", "with_past", "iota", "grouped_mm_fallback", "loop_carried", "loop_joined"}
# A gate halves its operand; a slope is per channel; two have no tag.
NOT_TAGGED = {"glu", "prelu", "hardswish", "log_sigmoid"}
ATEN = sorted(TABLE.keys() - ELSEWHERE)
MOVES = Trait.CAST | Trait.RESHAPE | Trait.EXPANSION | Trait.PARTING


def overloads(name: str) -> Iterator[Any]:
    """The overloads of an operator that make something new of tensors."""
    packet = getattr(torch.ops.aten, name)
    for found in (getattr(packet, overload) for overload in packet.overloads()):
        taken = [str(argument.type) for argument in found._schema.arguments]
        plain = "Dimname" not in str(found._schema) and not writes(found)
        if plain and any("Tensor" in kind for kind in taken):
            yield found


def rows(some: Trait) -> list[tuple[str, Meaning]]:
    return [(name, TABLE[name]) for name in ATEN if TABLE[name].traits & some]


def test_every_row_is_of_an_operator_that_there_is() -> None:
    assert {name for name in TABLE if not hasattr(torch.ops.aten, name)} == ELSEWHERE


def test_a_row_calls_layout_what_no_schema_says_is_a_view() -> None:
    for name, _ in rows(Trait.LAYOUT):
        assert not any(shares_memory(found) for found in overloads(name)), name


def test_what_moves_entries_is_layout_by_the_schema_or_by_the_row() -> None:
    for name, _ in rows(MOVES):
        known = [traits(found) for found in overloads(name) if "str" not in str(found)]
        assert any(found & Trait.LAYOUT for found in known), name


def test_nothing_that_changes_entries_is_layout() -> None:
    for name in ATEN:
        if not TABLE[name].traits & (MOVES | Trait.LAYOUT):
            assert not any(traits(found) & Trait.LAYOUT for found in overloads(name)), name


def test_activations_are_pointwise_by_torchs_tag_but_for_those_without_one() -> None:
    plain = {name for name, _ in rows(Trait.ACTIVATION) if not any_tagged(name, "pointwise")}
    assert plain == NOT_TAGGED


def any_tagged(name: str, tag: str) -> bool:
    return any(getattr(torch.Tag, tag) in found.tags for found in overloads(name))


def test_totals_reduce_and_dropouts_draw_by_torchs_tags() -> None:
    assert all(any_tagged(name, "reduction") for name, _ in rows(Trait.TOTAL))
    assert all(any_tagged(name, "nondeterministic_seeded") for name, _ in rows(Trait.DROPOUT))


@pytest.mark.parametrize("name", [n for n in ATEN if TABLE[n].operands and n != "_grouped_mm"])
def test_a_product_has_its_operands_where_the_row_says(name: str) -> None:
    """Multiplied by hand: the weight as it stands if it is turned, else transposed."""
    row, batch = TABLE[name], (2,) if name.startswith("b") else ()
    x, weight = torch.randn(*batch, 3, 4), torch.randn(*batch, 4, 5)
    if name == "mv":
        x, weight = torch.randn(3, 4), torch.randn(4)
    bias = torch.randn(5)
    expected = x @ weight + (bias if len(row.operands) > 2 else 0)
    given = (x, weight if row.turned else weight.mT, bias)
    placed = dict(zip(row.operands, given, strict=False))
    function = getattr(torch.ops.aten, name)
    torch.testing.assert_close(function(*(placed[i] for i in sorted(placed))), expected)


@pytest.mark.parametrize("name", [name for name in ATEN if TABLE[name].neutral is not None])
def test_a_neutral_second_operand_leaves_the_first(name: str) -> None:
    """Behind a product with nothing, and where a mask hides nothing, too."""
    x, row = torch.randn(3, 4), TABLE[name]
    same = torch.full_like(x, float(row.neutral or 0))
    function = getattr(torch.ops.aten, name)
    if row.operands:
        shape = (1, 3, 3) if name.startswith("b") else (3, 3)
        made = function(same, torch.eye(3).view(shape), x.view(*shape[:-2], 3, 4))
    elif name == "masked_fill":
        made = function(x, same.bool(), 7.0)
    elif name == "rsub":
        made = -function(x, same)
    else:
        made = function(x, same)
    torch.testing.assert_close(made.view(3, 4), x)


def test_norms_and_convolutions_name_their_weights_as_they_are_looked_for() -> None:
    for some in (Trait.NORM, Trait.CONV):
        for name, _ in rows(some):
            for found in overloads(name):
                assert {"input", "weight"} <= {each.name for each in found._schema.arguments}, name


def test_what_a_capture_parts_is_a_product_or_an_attention() -> None:
    assert all(TABLE[name].traits & (Trait.PRODUCT | Trait.ATTENTION) for name in PARTED)
