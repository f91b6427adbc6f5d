"""What torch's schemas say of a call is read as torch means it."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from peftsurgery.capture.schemas import arguments, op, overwritten, shares_memory, writes

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (aten.view.default, "view"),
        (aten.add.Tensor, "add"),
        (aten.add_.Tensor, "add"),
        (aten._unsafe_view.default, "_unsafe_view"),
        (aten.__and__.Tensor, "__and__"),
        (operator.getitem, "getitem"),
        (torch.nn.functional.linear, "linear"),
    ],
)
def test_an_operator_has_one_name_whatever_its_spelling(target: object, name: str) -> None:
    graph = fx.Graph()
    assert op(graph.create_node("call_function", target)) == name
    assert op(graph.placeholder("view")) == ""


def test_arguments_are_by_name_however_they_were_given() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    called = graph.call_function(aten.slice.Tensor, (x, 1), {"end": 3})
    assert arguments(called) == {"self": x, "dim": 1, "start": None, "end": 3, "step": 1}


def test_what_is_written_is_told_from_what_is_read() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert list(overwritten(graph.call_function(aten.copy_.default, (x, y)))) == [x]
    assert list(overwritten(graph.call_function(aten._foreach_mul_.Scalar, ([x, y], 2)))) == [x, y]
    assert list(overwritten(graph.call_function(aten.add.Tensor, (x, y)))) == []
    assert writes(aten.copy_.default)
    assert not any(map(writes, (aten.add.Tensor, operator.add)))


def test_memory_is_shared_where_torch_shares_it() -> None:
    x = torch.zeros(2, 3)
    for target in (aten.t.default, aten.alias.default, aten.clone.default, aten.neg.default):
        shared = target(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert shares_memory(target) is shared
    assert shares_memory(operator.getitem) is None
